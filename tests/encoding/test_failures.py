"""Claims: what goes wrong in a thread, on the disk or in the cast stops the run with the true error and no half store.

Nothing hangs, no thread outlives its run, and no more is decoded ahead than a set number of batches.
"""

import faulthandler
import gc
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from jepa_cache.encoder import frozen
from jepa_cache.encoding import decoding
from jepa_cache.encoding.decoding import Decoders
from jepa_cache.encoding.groups import scan_units
from jepa_cache.encoding.pipeline import WriterThread
from jepa_cache.files import DiskFullError
from jepa_cache.store.controls import publish_controls
from tests.encoded import all_files, encode, make_tars, make_tiny_tar, tiniest_config, tiny_config
from tests.faults import small_disk


@pytest.fixture(autouse=True)
def nothing_hangs_and_no_thread_stays():
    """A deadlock ends the test run with every thread's stack; a test's threads end with it."""
    before = set(threading.enumerate())
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    gc.collect()
    left = [t for t in threading.enumerate() if t not in before and t.name.startswith(("feed", "decode", "write"))]
    assert not left


@pytest.mark.parametrize(("filled", "batch", "step"), [(False, 4, 11), (True, 3, 4)])
def test_an_overflow_of_the_stored_dtype_stops_and_names_the_episode_and_its_step(
    tmp_path, monkeypatch, filled, batch, step
):
    real, batches = frozen.FrozenEncoder.encode, []

    def overflowing(self, groups):
        tokens = real(self, groups).clone()
        batches.append(len(groups))
        if len(batches) == batch:  # an episode has 15 steps: batches of 8 and 7, or the third is steps 16 to 23 of both
            tokens[3] = 1e6
        return tokens

    monkeypatch.setattr(frozen.FrozenEncoder, "encode", overflowing)
    config = tiniest_config(fill_batches=filled)
    with pytest.raises(ValueError, match=rf"episode 'y', step {step}: .*cannot be stored as float16"):
        encode(make_tars(tmp_path / "in", {"a": {"x": 60, "y": 60}}), tmp_path / "cache", config)
    assert not [path for path in all_files(tmp_path / "cache") if "tokens" in path]


@pytest.mark.parametrize("where", [(decoding, "luma_statistics"), (Decoders, "_start")], ids=["decoder", "feeder"])
def test_a_mistake_of_ours_in_a_thread_is_no_skip_but_stops_the_run_with_it(tmp_path, monkeypatch, where):
    def mistaken(*_):
        raise RuntimeError("a mistake in our own code")

    monkeypatch.setattr(*where, mistaken)
    with pytest.raises(RuntimeError, match="a mistake in our own code"):
        encode(make_tiny_tar(tmp_path / "in", "a"), tmp_path / "cache", tiniest_config())
    assert not list((tmp_path / "cache").rglob("*.zarr"))


def test_a_full_disk_is_named_and_the_same_command_continues_on_a_larger_one(tmp_path):
    for seed, name in enumerate("ab"):
        folder = make_tiny_tar(tmp_path / "in", name, seed)
    alone = encode(folder, tmp_path / "alone", tiniest_config()).manifest
    # tmpfs gives whole pages.
    num_bytes = 4096 * sum(-(-len(content) // 4096) for content in all_files(tmp_path / "alone").values())
    with small_disk(tmp_path / "disk", num_bytes * 3 // 4) as disk:
        words = rf"No space left on device: {disk}/root/.* cannot be written, .* free there"
        with pytest.raises(DiskFullError, match=words):
            encode(folder, disk / "root", tiniest_config())
        num_published = len(list(disk.glob("root/tokens/*/*.zarr")))
        assert num_published >= 1 and not list(disk.rglob(".jepa-cache-*"))
        subprocess.run(["mount", "-o", f"remount,size={num_bytes * 3}", str(disk)], check=True)
        result = encode(folder, disk / "root", tiniest_config())
    assert result.manifest == alone and result.num_encoded == 2 - num_published


@pytest.mark.parametrize("queue", [WriterThread.__call__, WriterThread.behind])
def test_after_a_failed_write_no_other_call_is_made(queue):
    made, gate = [], threading.Event()

    def fail():
        gate.wait(10)
        raise OSError("full")

    with pytest.raises(OSError, match="full"), WriterThread() as write:
        queue(write, fail)
        write.behind(lambda: made.append("published"))
        for number in range(3):
            write(made.append, number)
        gate.set()
    assert "published" not in made and (queue is WriterThread.behind or not made)


def test_a_unit_is_published_while_the_next_is_written_and_a_third_waits():
    made, gate, written = [], threading.Event(), threading.Event()
    with WriterThread() as write:
        write.behind(lambda: (gate.wait(10), made.append("first published")))
        write(made.append, "second written")
        write(written.set)
        write.behind(lambda: made.append("second published"))
        write(made.append, "third written")
        assert written.wait(10)
        assert made == ["second written"]
        gate.set()
    assert made[:2] == ["second written", "first published"] and len(made) == 4


@pytest.fixture
def decoders_of(tmp_path):
    """Two units of five recordings, of 60, 5, 33, 8 and 60 frames, each a batch."""
    folder = make_tars(tmp_path / "in", {"a": {"u": 60, "v": 5, "w": 33}, "b": {"x": 8, "y": 60}})

    def build(num_decoders):
        config = tiny_config(batch_size=1, decoder="pyav", num_decoders=num_decoders, decode_ahead_mib=1, fps=20.0)
        (group,), _ = scan_units(config, [str(folder)], folder)
        units = sorted(group.units, key=lambda unit: unit.name)
        return Decoders(group, units, lambda frames: torch.zeros(len(frames), 3, 2, 2))

    return build


@pytest.mark.parametrize(("num_decoders", "stop_after"), [(1, 0), (3, 1)])
def test_a_consumer_that_stops_early_is_never_waited_for_and_memory_is_bounded_until_then(
    decoders_of, num_decoders, stop_after
):
    with decoders_of(num_decoders) as units:
        _, streams = next(iter(units))
        for number, stream in enumerate(streams):
            if number == stop_after:
                next(iter(stream))  # one of its batches
                threading.Event().wait(0.2)
                assert units.budget.peak_bytes <= units.budget.limit_bytes
                break
            assert len(list(stream)) == 60


def test_controls_are_read_by_no_thread_that_outlives_python(tmp_path):
    """One of Arrow's that dropped the file's bytes while Python ended with an error aborted it: exit code 134 for 1."""
    publish_controls(tmp_path / "controls.parquet", [("x", {name: np.arange(100.0) for name in "abcdefgh"})])
    code = (
        "import os, sys; from pathlib import Path; import pyarrow.parquet; from jepa_cache.store.controls import iter_controls\n"
        "count = lambda: len(os.listdir('/proc/self/task')); before = count()\n"
        "print(len(list(iter_controls(Path(sys.argv[1])))), count() - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "controls.parquet")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "1 0\n"
