"""Claims: recordings that are not found say the way out, from wherever the command was typed: render, pack, or name them in full."""

import dataclasses
import json

import pytest

from jepa_cache.config.loading import load_config
from jepa_cache.encoding.units import list_units
from jepa_cache.sources import build_source, suggest_source
from tests.encoded import tiny_config
from tests.workspace import SUITE_SETTINGS

VPT = tiny_config().dataset
PAIR = ["checkout/films/day/a.mp4", "checkout/films/day/a.json"]
RAW = ["checkout/films/day/trajectory.h5", "checkout/films/day/recordings/MP4/1.mp4"]
RECORDS = ["checkout/films/1.0.0/features.json", "checkout/films/1.0.0/x.tfrecord-00000"]
LEROBOT = ["checkout/films/meta/info.json", "checkout/films/videos/a.mp4"]


def find(preset, base, *inputs):
    return list_units(build_source(preset.source, preset.source_options), preset, inputs, base)


@pytest.mark.parametrize("folder", ["elsewhere", "shards/sample"])
def test_a_sample_that_was_never_rendered_names_the_stage_that_renders_it(tmp_path, folder):
    sample = dataclasses.replace(VPT, name="sample", inputs=("shards/sample",), sample={})
    (tmp_path / folder).mkdir(parents=True)  # what the stage leaves when another data set is chosen
    with pytest.raises(ValueError, match=r"not rendered yet: .*shards/sample holds no .*stages/sample\.py"):
        find(sample, tmp_path)
    with pytest.raises(ValueError, match="finds no"):
        find(sample, tmp_path, "elsewhere")


def test_a_simulated_robots_recordings_count_when_they_are_whole_and_never_among_real_ones(tmp_path, capsys):
    robot, raw = (load_config(SUITE_SETTINGS, [f"dataset={name}"]).dataset for name in ("sample_robot", "droid_raw"))
    for folder in ("sample_robot/SIMULATED/success/2025-01-01/push-0", "mine"):
        (tmp_path / "shards" / folder).mkdir(parents=True)
        (tmp_path / "shards" / folder / "trajectory.h5").touch()
    with pytest.raises(ValueError, match=r"not rendered yet: .*stages/sample\.py dataset=sample_robot"):
        find(robot, tmp_path)  # the index comes last
    (tmp_path / "shards/sample_robot/index.json").touch()
    (made,), (real,) = find(robot, tmp_path), find(raw, tmp_path, "shards")
    assert made.path.parent.name == "push-0" and real.path.parent.name == "mine"
    assert "skipped: 1 synthetic recordings" in capsys.readouterr().out
    index = tmp_path / "shards/sample_robot/index.json"
    index.write_text(json.dumps({"config": robot.sample}))
    assert find(robot, tmp_path) == [made]
    index.write_text(json.dumps({"config": robot.sample | {"random_looks": 0.0}}))
    with pytest.raises(ValueError, match=r"random_looks 0\.0, now 1\.0.*stages/sample\.py dataset=sample_robot"):
        find(robot, tmp_path)
    assert find(robot, tmp_path, "shards/sample_robot") == [made], "named, it is taken as it is"
    with pytest.raises(ValueError, match="only synthetic sample recordings, but dataset is 'droid_raw'"):
        find(raw, tmp_path, "shards/sample_robot")


@pytest.mark.parametrize(
    ("named", "files", "note"),
    [
        ("films", ["here/films/a.mp4"], "{base}/here/films is there: name it so, in full"),
        ("droid_1000", ["checkout/droid_100/a"], "droid_1000 does not exist; did you mean 'droid_100'?"),
        ("films", ["here/films/a.mp4", "checkout/films/a.txt"], None),  # what was meant is there, only without any
        ("films", ["checkout/films/june/a.mp4"], "jepa-cache pack {base}/checkout/films OUT"),
        ("films", RAW, "dataset=droid_raw"),
        ("films", RECORDS, "dataset=droid_rlds"),
        ("films", LEROBOT, "configs/dataset/lerobot.yaml"),
        ("films", PAIR, "dataset=mp4_json"),
    ],
)
def test_inputs_that_find_nothing_say_where_recordings_are_or_what_reads_them(
    tmp_path, monkeypatch, named, files, note
):
    for file in ("here/.keep", "checkout/.keep", *files):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="finds no") as caught:
        find(VPT, tmp_path / "checkout", named)
    notes = getattr(caught.value, "__notes__", [])
    assert len(notes) == (note is not None) and (note is None or note.format(base=tmp_path) in notes[0])
    assert ("pack" in str(notes)) == ("pack" in str(note))
    if files == RAW:  # a source is not recommended to itself
        assert suggest_source(tmp_path / "checkout/films", "droid_raw") is None
