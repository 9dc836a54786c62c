"""Claims: encoders that work side by side on one root encode every unit exactly once between them, and end with one valid cache.

One that is killed holds up nobody: its locks end with it, the other takes over what it had not published, at most one unit is
lost, and nothing of it stays.
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

SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
import numpy, pyarrow, torch, webdataset.tariterators
import jepa_cache.encoder.frozen
from jepa_cache.encoding import pipeline
from tests.encoded import encode, tiniest_config

folder, base = Path(sys.argv[1]), Path(sys.argv[2])
config = tiniest_config()
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("recordings")
    for seed, name in enumerate(UNITS):
        make_tiny_tar(base, name, seed)
    return base


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("alone") / "cache"
    return encode(folder, root, tiniest_config()).manifest.digest, all_files(root)


@pytest.fixture(scope="module")
def side_by_side(folder, tmp_path_factory):
    """Twice two processes: both live; and one is killed in its second unit, while the other waits for it."""
    base = tmp_path_factory.mktemp("side-by-side")
    command = [sys.executable, "-c", SCRIPT, str(folder), str(base)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr[-3000:]
    return base, json.loads(process.stdout.splitlines()[-1]), process.stderr


def report_of(place, name):
    return json.loads((place / f"{name}.json").read_text())


def test_two_encoders_encode_every_unit_exactly_once_between_them(side_by_side, alone):
    place, statuses = side_by_side[0] / "live", side_by_side[1]["live"]
    assert statuses == [0, 0]
    reports = [report_of(place, name) for name in ("one", "two")]
    assert sorted(key for report in reports for key in report["encoded"]) == [
        f"episode-{seed}" for seed in range(len(UNITS))
    ]
    assert sum(report["num_encoded"] for report in reports) == len(UNITS)
    assert all(report["encoded"] for report in reports)  # both had work
    assert {report["manifest"] for report in reports} == {alone[0]}
    assert all_files(place / "cache") == alone[1] and not list((place / "cache").rglob(".jepa-cache-*"))


def test_when_one_of_two_is_killed_the_other_takes_over_and_one_unit_at_most_was_for_nothing(side_by_side, alone):
    place, statuses, shown = side_by_side[0] / "killed", side_by_side[1]["killed"], side_by_side[2]
    assert statuses == [9, 0]
    report = report_of(place, "two")
    assert (place / "dying").read_text() in report["encoded"]  # taken over
    # The dead one had published one unit at most, and nobody made that one again.
    assert len(report["encoded"]) >= len(UNITS) - 1 and len(set(report["encoded"])) == len(report["encoded"])
    assert f"waiting for another encoder: unit {(place / 'waiting').read_text()}" in shown
    assert report["manifest"] == alone[0]
    assert all_files(place / "cache") == alone[1] and not list((place / "cache").rglob(".jepa-cache-*"))


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


def test_who_waits_is_told_for_which_unit_until_the_store_is_there_or_its_maker_gone(tmp_path, monkeypatch, group):
    monkeypatch.setattr(task.time, "sleep", lambda seconds: None)
    root, unit = CacheRoot(tmp_path), group.units[0]
    store, told = group.tokens(root, unit), []
    for end in ("published", "gone"):
        claim = root.claim(store)
        ends = {"published": store.mkdir, "gone": claim.release}

        def on_wait(name, end=ends[end]):
            told.append(name)
            if len(told) % 3 == 0:
                end()

        wait_for_others(root, [(group, unit)], on_wait)
        if end == "published":
            claim.release()
            store.rmdir()
    assert told == [unit.name] * 6


def test_every_claim_is_let_go_although_the_file_of_one_cannot_be_removed(tmp_path, monkeypatch, group):
    root = CacheRoot(tmp_path)
    with pytest.raises(OSError, match="Read-only"), Claims(root, group) as claims:
        assert list(claims.take()) == group.units

        def refuse(path, **_):
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr("pathlib.Path.unlink", refuse)
    assert not any(root.is_claimed(group.tokens(root, unit)) for unit in group.units)
