"""What the record of a training promises.

Claims:
- what is logged is read back, and DVCLive's files hold the same numbers at the same train steps;
- after a resume there is one row for each train step and none beyond the checkpoint, in both;
- a last line that a crash cut off is no row, and no failure while the CSV is rewritten loses its rows.
"""

import csv
import json
from pathlib import Path

import pytest

from jepa_cache.training.logging import COLUMNS, Recorder, open_trackers, read_rows


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # DVCLive looks for a repository around the working folder


def record(folder: Path, steps, *, resumed_step: int = 0, offset: float = 0.0) -> None:
    trackers = open_trackers(["dvclive"], live_folder=folder / "live", run_folder=folder / "run", settings={})
    recorder = Recorder(folder / "train.csv", COLUMNS, trackers, resumed_step=resumed_step)
    for step in steps:
        row = {"step": step, "total": step / 3 + offset, "jloss": 0.1 * step, "lr": 1e-3 / step}
        recorder.log(row | ({"val_jloss": 0.7} if step % 4 == 0 else {}))
    recorder.close()


def live_rows(folder: Path, name: str) -> list[tuple[int, float]]:
    with (folder / f"live/plots/metrics/{name}.tsv").open(newline="") as file:
        return [(int(row["step"]), float(row[name])) for row in csv.DictReader(file, delimiter="\t")]


def csv_rows(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(int(row["step"]), float(row[name])) for row in read_rows(folder / "train.csv") if row[name]]


def test_what_is_logged_is_read_back_and_absent_columns_stay_empty(tmp_path):
    record(tmp_path, [2, 4])
    first, second = read_rows(tmp_path / "train.csv")
    assert list(first) == list(COLUMNS)
    assert (first["step"], float(first["total"]), first["val_jloss"]) == ("2", 2 / 3, "")
    assert float(second["val_jloss"]) == 0.7


@pytest.mark.parametrize("name", ["total", "jloss", "lr", "val_jloss"])
def test_dvclive_mirrors_the_csv_also_after_a_resume(tmp_path, name):
    record(tmp_path, range(2, 14, 2))
    record(tmp_path, range(10, 18, 2), resumed_step=8, offset=5.0)
    assert live_rows(tmp_path, name) == csv_rows(tmp_path, name)
    summary = json.loads((tmp_path / "live/metrics.json").read_text())
    assert summary["step"] == 16 and summary["total"] == 16 / 3 + 5.0


def test_a_resume_drops_the_rows_beyond_the_checkpoint_and_keeps_the_others(tmp_path):
    record(tmp_path, range(2, 14, 2))
    record(tmp_path, range(10, 18, 2), resumed_step=8, offset=5.0)
    steps = csv_rows(tmp_path, "total")
    assert [step for step, _ in steps] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert [total > 5 for _, total in steps] == [False] * 4 + [True] * 4


def test_a_resume_at_the_end_keeps_everything_as_it_is(tmp_path):
    record(tmp_path, [1, 2, 3])
    before = (tmp_path / "train.csv").read_bytes()
    record(tmp_path, [], resumed_step=3)
    assert (tmp_path / "train.csv").read_bytes() == before
    assert live_rows(tmp_path, "total") == csv_rows(tmp_path, "total")
    assert json.loads((tmp_path / "live/metrics.json").read_text())["step"] == 3


def test_a_last_line_cut_off_anywhere_is_no_row(tmp_path):
    record(tmp_path, [4, 8])
    whole = (tmp_path / "train.csv").read_bytes()
    start = whole.rindex(b"\n", 0, len(whole) - 2) + 1
    for end in range(start, len(whole) - 1):
        (tmp_path / "train.csv").write_bytes(whole[:end])
        assert [row["step"] for row in read_rows(tmp_path / "train.csv")] == ["4"], whole[start:end]
    record(tmp_path, [8], resumed_step=4)
    assert (tmp_path / "train.csv").read_bytes() == whole


def test_no_file_and_an_empty_file_hold_no_rows(tmp_path):
    assert read_rows(tmp_path / "train.csv") == []
    (tmp_path / "train.csv").touch()
    assert read_rows(tmp_path / "train.csv") == []


def test_a_failure_while_the_csv_is_rewritten_loses_no_row(tmp_path, monkeypatch):
    record(tmp_path, [1, 2, 3])
    before = (tmp_path / "train.csv").read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(csv.DictWriter, "writerows", fail)
    with pytest.raises(OSError, match="No space"):
        record(tmp_path, [], resumed_step=3)
    assert (tmp_path / "train.csv").read_bytes() == before
