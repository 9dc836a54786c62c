"""Claims: encoders that work side by side on one root encode every unit exactly once between them, and end with one valid cache.

One that is killed holds up nobody: its locks end with it, the other takes over what it had not published, at most one unit
is lost, and nothing of it stays.
"""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from jepa_cache.encoding import task
from jepa_cache.encoding.task import Claims, wait_for_others
from jepa_cache.sources import Unit
from jepa_cache.store.root import CacheRoot
from tests.encoded import all_files, encode, make_tiny_tar, tiniest_config

UNITS = "abcd"

# Twice two processes: both live; and one is killed in its second unit, while the other waits for it.
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
import numpy, pyarrow, torch, webdataset.tariterators
import jepa_cache.encoder.frozen
from jepa_cache.encoding import pipeline, task
from tests.encoded import encode, tiniest_config

folder, base = Path(sys.argv[1]), Path(sys.argv[2])
config, task.POLL_S = tiniest_config(), 0.1
encode_one, wait = pipeline._OpenUnit.encode, pipeline.ProgressBar.wait

def start(mode, name, dies_at=None):
    child = os.fork()
    if child:
        return child
    place, encoded = base / mode, []
    def watched(self, stream, timing):
        encoded.append(stream.episode.key)
        if len(encoded) == dies_at:
            (place / "dying").write_text(stream.episode.key)
            while not (place / "waiting").exists():  # the other one waits for this unit
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
        return encode_one(self, stream, timing)
    def waiting(self, unit):
        (place / "waiting").write_text(unit)
        wait(self, unit)
    pipeline._OpenUnit.encode, pipeline.ProgressBar.wait = watched, waiting
    (place / f"ready-{name}").touch()
    while not all((place / f"ready-{other}").exists() for other in ("one", "two")):
        time.sleep(0.01)
    result = encode(folder, place / "cache", config)
    (place / f"{name}.json").write_text(json.dumps(
        {"encoded": encoded, "num_encoded": result.num_encoded, "manifest": result.manifest.digest}))
    os._exit(0)

statuses = {}
for mode, dies_at in (("live", None), ("killed", 2)):
    (base / mode).mkdir()
    children = [start(mode, "one", dies_at), start(mode, "two")]
    statuses[mode] = [os.waitpid(child, 0)[1] for child in children]
print(json.dumps(statuses))
"""


def test_two_encoders_encode_every_unit_once_and_one_takes_over_what_a_killed_one_had_not_published(tmp_path):
    for seed, name in enumerate(UNITS):
        folder = make_tiny_tar(tmp_path / "in", name, seed)
    manifest = encode(folder, tmp_path / "alone", tiniest_config()).manifest.digest
    command = [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr[-3000:]
    assert json.loads(process.stdout.splitlines()[-1]) == {"live": [0, 0], "killed": [9, 0]}
    for mode in ("live", "killed"):
        reports = [json.loads(path.read_text()) for path in (tmp_path / mode).glob("*.json")]
        assert {report["manifest"] for report in reports} == {manifest}
        assert all_files(tmp_path / mode / "cache") == all_files(tmp_path / "alone")
        assert not list((tmp_path / mode / "cache").rglob(".jepa-cache-*"))
        encoded = [key for report in reports for key in report["encoded"]]
        assert len(set(encoded)) == len(encoded)
        if mode == "live":
            assert all(report["encoded"] for report in reports)  # both had work
            assert sum(report["num_encoded"] for report in reports) == len(encoded) == len(UNITS)
        else:
            # The dead one had published one unit at most, and nobody made that one again.
            assert len(encoded) >= len(UNITS) - 1 and (tmp_path / mode / "dying").read_text() in encoded
            unit = (tmp_path / mode / "waiting").read_text()
            assert f"waiting for another encoder: unit {unit}" in process.stderr


@pytest.fixture
def group(monkeypatch):
    """Three units under one recipe, whose stores are whole where there is a folder."""
    monkeypatch.setattr(CacheRoot, "find_store", lambda root, store: True if store.is_dir() else None)
    units = [Unit(name, (), f"{index:x}" * 64) for index, name in enumerate(UNITS[:3])]
    return SimpleNamespace(units=units, tokens=lambda root, unit: root.tokens("recipe", unit.digest))


def test_a_unit_that_another_holds_is_left_for_later_and_one_that_is_finished_meanwhile_for_good(tmp_path, group):
    root, units = CacheRoot(tmp_path), group.units
    with Claims(root, group) as one, Claims(root, group) as two:
        taken = one.take()
        assert next(taken) == units[0]
        assert len(list(tmp_path.rglob("*.claim"))) == 1
        group.tokens(root, units[1]).mkdir()  # published by a third one
        assert list(two.take()) == [units[2]]
        assert two.busy == [units[0]] and two.num_taken == 1
        group.tokens(root, units[0]).mkdir()
        assert list(taken) == [] and one.busy == [units[2]], "a store that is there is let go"
        assert not root.is_claimed(group.tokens(root, units[0]))
    assert not list(tmp_path.rglob(".jepa-cache-*"))


@pytest.mark.parametrize("end", ["published", "gone"])
def test_who_waits_is_told_for_which_unit_until_the_store_is_there_or_its_maker_gone(tmp_path, monkeypatch, group, end):
    monkeypatch.setattr(task, "POLL_S", 0)
    root, unit, told = CacheRoot(tmp_path), group.units[0], []
    store = group.tokens(root, unit)
    claim = root.claim(store)

    def on_wait(name):
        told.append(name)
        if len(told) == 3:
            store.mkdir() if end == "published" else claim.release()

    wait_for_others(root, [(group, unit)], on_wait)
    assert told == [unit.name] * 3


def test_every_claim_is_let_go_although_the_file_of_one_cannot_be_removed(tmp_path, monkeypatch, group):
    root = CacheRoot(tmp_path)

    def refuse(path, **_):
        raise OSError(30, "Read-only file system")

    with pytest.raises(OSError, match="Read-only"), Claims(root, group) as claims:
        assert list(claims.take()) == group.units
        monkeypatch.setattr("pathlib.Path.unlink", refuse)
    assert not any(root.is_claimed(group.tokens(root, unit)) for unit in group.units)
