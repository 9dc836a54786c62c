"""Claims: encoders that work side by side on one root encode every unit exactly once between them, and end with one valid cache.

One that is killed holds up nobody: its locks end with it, the other takes over what it had not published, at most one unit
is lost, and nothing of it stays.
"""

import json
import os
import signal
import time

import pytest

from jepa_cache.encoding import pipeline, run, task
from tests.encoded import all_files, encode, forking_context, make_tiny_tar, tiniest_config

UNITS = "abcd"


def work(folder, place, name, dies_at, other_dies):
    """A process that encodes beside another one, and may be killed in a unit, once the other waits for that unit.

    With one decoder it claims one unit at a time, and of the second it waits until the other is about to die: so both have some.
    """
    encode_one, wait, encoded = pipeline._OpenUnit.encode, run.wait_for_others, []

    def watched(self, stream):
        encoded.append(stream.episode.key)
        if len(encoded) == dies_at:
            (place / "dying").write_text(stream.episode.key)
            while not (place / "waiting").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        while other_dies and len(encoded) == 2 and not (place / "dying").exists():
            time.sleep(0.01)
        time.sleep(0.05)
        return encode_one(self, stream)

    def waiting(*given):
        (place / "waiting").touch()
        wait(*given)

    pipeline._OpenUnit.encode, run.wait_for_others, task.POLL_S = watched, waiting, 0.05
    (place / f"ready-{name}").touch()
    while not all((place / f"ready-{other}").exists() for other in ("one", "two")):
        time.sleep(0.01)
    result = encode(folder, place / "cache", tiniest_config(num_decoders=1))
    report = {"encoded": encoded, "num_encoded": result.num_encoded, "manifest": result.manifest.digest}
    (place / f"{name}.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Recordings, and what one encoder makes of them."""
    base = tmp_path_factory.mktemp("alone")
    for seed, name in enumerate(UNITS):
        folder = make_tiny_tar(base / "in", name, seed)
    return folder, encode(folder, base / "cache", tiniest_config()).manifest.digest, all_files(base / "cache")


@pytest.mark.parametrize("dies_at", [None, 2])
def test_two_encoders_encode_every_unit_once_and_one_takes_over_what_a_killed_one_had_not_published(
    alone, tmp_path, dies_at
):
    folder, manifest, files = alone
    given = [(folder, tmp_path, "one", dies_at, False), (folder, tmp_path, "two", None, dies_at is not None)]
    processes = [forking_context().Process(target=work, args=each) for each in given]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL if dies_at else 0, 0]
    reports = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert {report["manifest"] for report in reports} == {manifest}
    assert all_files(tmp_path / "cache") == files and not list((tmp_path / "cache").rglob(".jepa-cache-*"))
    encoded = [key for report in reports for key in report["encoded"]]
    assert len(set(encoded)) == len(encoded)
    if dies_at is None:
        assert all(report["encoded"] for report in reports)  # both had work
        assert sum(report["num_encoded"] for report in reports) == len(encoded) == len(UNITS)
    else:
        # The dead one had published one unit at most, and nobody made that one again.
        assert len(encoded) >= len(UNITS) - 1 and (tmp_path / "dying").read_text() in encoded
