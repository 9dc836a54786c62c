"""Claims: a bad recording is named with its reason, costs no other one, and beyond a set share there is no manifest.

What goes wrong in a thread stops the run with the true error and leaves nothing half-written; nothing ever hangs.
"""

import errno
import faulthandler
import gc
import json
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from jepa_cache.config.loading import load_config
from jepa_cache.encoding import decoding
from jepa_cache.encoding.decoding import Decoders
from jepa_cache.encoding.groups import scan_units
from jepa_cache.encoding.pipeline import WriterThread
from jepa_cache.files import DiskFullError
from jepa_cache.sources.vpt import VptSource
from jepa_cache.store.controls import ControlsWriter
from tests.encoded import all_files, damage_middle, encode, make_tars, read_episodes, read_video, tiny_config
from tests.faults import small_disk
from tests.makers import make_rows, make_vpt_pair, to_jsonl, write_tar, write_vpt_tar
from tests.workspace import SUITE_SETTINGS

DECODERS = ["decord", "pyav"]


@pytest.fixture(autouse=True)
def nothing_hangs_and_no_thread_stays():
    """A deadlock ends the test run with every thread's stack; a test's threads end with it."""
    before = set(threading.enumerate())
    faulthandler.dump_traceback_later(30, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    gc.collect()
    left = [t for t in threading.enumerate() if t not in before and t.name.startswith(("feed", "decode", "write"))]
    assert not left


@pytest.fixture(scope="module")
def pairs():
    return {key: make_vpt_pair(60, seed) for seed, key in enumerate("abcd")}


def needs(decoder):
    if decoder == "decord":
        pytest.importorskip("decord")


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_video_that_breaks_in_the_middle_is_skipped_and_the_others_rows_stay_right(tmp_path, pairs, decoder):
    needs(decoder)
    broken = (damage_middle(pairs["b"][0]), pairs["b"][1])
    # Batches of 2: some of the broken recording's tokens have been written when it breaks.
    config = tiny_config(decoder=decoder, batch_size=2, max_skipped_share=0.5)
    write_vpt_tar(tmp_path / "in/x.tar", {"a": pairs["a"], "b": broken, "c": pairs["c"]})
    write_vpt_tar(tmp_path / "whole/x.tar", {"a": pairs["a"], "c": pairs["c"]})
    result = encode(tmp_path / "in", tmp_path / "cache", config)
    expected = encode(tmp_path / "whole", tmp_path / "other", config)
    if decoder == "pyav":  # decord decodes ahead, and may report the damage before its first frames
        assert result.timing.num_frames > expected.timing.num_frames
    assert [recording["key"] for recording in result.manifest.skipped] == ["b"]
    assert "undecodable packets: 30; the first at frame 30 of 60" in result.manifest.skipped[0]["reason"]
    # The reason is the same in every run: it holds no time, no place and nothing of the batches.
    other = encode(tmp_path / "in", tmp_path / "cache8", tiny_config(decoder=decoder, max_skipped_share=0.5))
    assert other.manifest.skipped == result.manifest.skipped
    assert not re.search(r"\d\d:\d\d:\d\d", str(result.manifest.skipped)) and str(tmp_path) not in str(
        other.manifest.skipped
    )
    assert result.manifest.entries[0].num_episodes == 2
    one, two = read_episodes(result, tmp_path / "cache"), read_episodes(expected, tmp_path / "other")
    assert one.keys() == two.keys() == {"a", "c"}
    for key in two:
        for name in two[key]:
            assert np.array_equal(one[key][name], two[key][name], equal_nan=name not in ("gui",)), (key, name)


def test_every_kind_of_bad_recording_is_named_with_its_reason_and_the_rest_goes_on(tmp_path, pairs):
    bad_lines = to_jsonl(make_rows(60, 7)).replace(b'"dx":', b'"dx:', 1)
    write_tar(
        tmp_path / "in/x.tar",
        [
            ("a.mp4", pairs["a"][0]),
            ("a.jsonl", pairs["a"][1]),
            ("alone.mp4", pairs["b"][0]),
            ("novideo.mp4", b"not a video"),
            ("novideo.jsonl", pairs["b"][1]),
            ("badline.mp4", pairs["b"][0]),
            ("badline.jsonl", bad_lines),
            ("short.mp4", make_vpt_pair(9, 5)[0]),
            ("short.jsonl", make_vpt_pair(9, 5)[1]),
            ("c.mp4", pairs["c"][0]),
            ("c.jsonl", pairs["c"][1]),
        ],
    )
    config = tiny_config(mode="clip", frames_per_clip=8, max_skipped_share=0.7)
    result = encode(tmp_path / "in", tmp_path / "cache", config)
    reasons = {recording["key"]: recording["reason"] for recording in result.manifest.skipped}
    expected = {"alone": "jsonl", "novideo": "opened", "short": "clip mode needs 8"}
    assert reasons.keys() == expected.keys()
    for key, words in expected.items():
        assert words in reasons[key]
    assert read_episodes(result, tmp_path / "cache").keys() == {"a", "badline", "c"}
    assert any("badline" in note and "line 1" in note for note in result.manifest.notes), (
        "its good lines are used, and said"
    )


def test_too_large_a_share_of_bad_recordings_stops_without_a_manifest_and_keeps_what_was_encoded(tmp_path, pairs):
    write_tar(
        tmp_path / "in/x.tar", [("a.mp4", pairs["a"][0]), ("a.jsonl", pairs["a"][1]), ("alone.mp4", pairs["b"][0])]
    )
    root = tmp_path / "cache"
    with pytest.raises(ValueError, match=r"1 of 2 recordings were skipped \(50%\).*max_skipped_share=0\.4"):
        encode(tmp_path / "in", root, tiny_config(max_skipped_share=0.4))
    assert len(list(root.glob("tokens/*/*.zarr"))) == 1
    again = encode(tmp_path / "in", root, tiny_config(max_skipped_share=0.5))
    assert again.num_encoded == 0 and len(again.manifest.skipped) == 1
    write_tar(tmp_path / "none/x.tar", [("alone.mp4", pairs["b"][0])])
    with pytest.raises(ValueError, match="no usable recording: all 1 were skipped"):
        encode(tmp_path / "none", root, tiny_config(max_skipped_share=1.0))


def test_an_action_space_that_no_recording_allows_stops_before_anything_is_encoded(tmp_path, pairs):
    write_vpt_tar(tmp_path / "in/x.tar", {"a": pairs["a"], "b": pairs["b"]})
    root = tmp_path / "cache"
    words = r"'pose7' fits none of the first 2 recordings.* needs the controls x_m.* set encode\.action_space to vpt13 or vpt36 or vpt25"
    with pytest.raises(ValueError, match=words):
        encode(tmp_path / "in", root, tiny_config(action_space="pose7"))
    assert not list(root.glob("tokens/*/*.zarr"))
    with pytest.raises(
        ValueError, match=r"no usable recording: all 2 were skipped .*pose7"
    ):  # asked for in so many words
        encode(tmp_path / "in", root, tiny_config(action_space="pose7", max_skipped_share=1.0))
    assert list(root.glob("tokens/*/*.zarr"))


def test_columns_that_the_action_space_would_drop_stop_before_anything_is_encoded(tmp_path, pairs):
    rows = np.arange(60 * 7).reshape(60, 7).tolist()
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.mp4").write_bytes(pairs["a"][0])
    (tmp_path / "in/a.json").write_text(json.dumps({"fps": 20, "actions": rows, "states": rows}))
    given = ["dataset=mp4_json", "encoder=tiny", "encode.device=cpu"]
    config = load_config(SUITE_SETTINGS, [*given, "encode.action_space=vector_last6x7"])
    with pytest.raises(ValueError, match=r"has no column for action_6 .* set encode\.action_space to vector_last7x7 "):
        encode(tmp_path / "in", tmp_path / "cache", config)
    assert not list((tmp_path / "cache").glob("tokens/*/*.zarr"))
    config = load_config(SUITE_SETTINGS, [*given, "encode.action_space=vector_last7x7"])
    assert encode(tmp_path / "in", tmp_path / "cache", config).num_encoded == 1


def test_an_episode_that_the_action_space_cannot_describe_is_left_out_by_name(tmp_path, pairs):
    rows = make_rows(60, 8)
    for row in rows[20:]:
        del row["hotbar"]
    write_vpt_tar(tmp_path / "in/x.tar", {"a": pairs["a"], "old": (pairs["b"][0], to_jsonl(rows)), "c": pairs["c"]})
    result = encode(tmp_path / "in", tmp_path / "cache", tiny_config(max_skipped_share=0.5))
    assert [recording["key"] for recording in result.manifest.skipped] == ["old"]
    assert "vpt13" in result.manifest.skipped[0]["reason"] and "tick 20" in result.manifest.skipped[0]["reason"]
    assert result.manifest.entries[0].num_episodes == 2
    episodes = read_episodes(result, tmp_path / "cache")
    assert np.isnan(episodes["old"]["actions"]).all() and np.isnan(episodes["old"]["states"]).all()
    assert np.isfinite(episodes["c"]["actions"][:-1]).all()


def test_an_overflow_of_the_stored_dtype_stops_and_names_the_episode_and_its_step(tmp_path, pairs, monkeypatch):
    from jepa_cache.encoder import frozen

    write_vpt_tar(tmp_path / "in/x.tar", {"a": pairs["a"], "b": pairs["b"]})
    real, batches = frozen.FrozenEncoder.encode, []

    def overflowing(self, groups):
        tokens = real(self, groups).clone()
        batches.append(len(groups))
        if len(batches) == 4:  # a has 15 steps: batches of 8 and 7; this is the second of b
            tokens[3] = 1e6
        return tokens

    monkeypatch.setattr(frozen.FrozenEncoder, "encode", overflowing)
    with pytest.raises(ValueError, match=r"episode 'b', step 11: .*cannot be stored as float16"):
        encode(tmp_path / "in", tmp_path / "cache")
    assert not [path for path in all_files(tmp_path / "cache") if "tokens" in path]


@pytest.mark.parametrize("where", ["while it is opened", "in its middle"])
def test_a_video_that_cannot_be_read_from_the_disk_makes_its_unit_unreadable_and_the_others_land(
    tmp_path, monkeypatch, where
):
    folder = make_tars(tmp_path / "in", {"a": {"u": 60, "v": 60, "w": 60}, "b": {"x": 60}})
    num_bytes = len(read_video(folder, "v"))
    real = decoding.open_video

    class Failing:
        def __init__(self, video):
            self.video, self.decoder = video, video.decoder

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.video.close()

        def read(self, frames):
            if frames[0] > 16:
                raise OSError(errno.EIO, "Input/output error", "/data/v.mp4")
            return self.video.read(frames)

    def open_video(video, *given, **options):
        if len(video) != num_bytes:
            return real(video, *given, **options)
        if where == "while it is opened":
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/v.mp4")
        return Failing(real(video, *given, **options))

    monkeypatch.setattr(decoding, "open_video", open_video)
    config = tiny_config(max_skipped_share=0.5, batch_size=2)
    result = encode(folder, tmp_path / "cache", config)
    (lost,) = result.manifest.skipped
    assert lost["key"] == "a.tar" and lost["reason"].startswith("v.mp4 cannot be read: ")
    assert result.num_encoded == len(result.manifest.entries) == 1
    assert not list((tmp_path / "cache").rglob(".jepa-cache-*"))
    monkeypatch.undo()
    again = encode(folder, tmp_path / "cache", config)
    assert again.num_encoded == 1 and not again.manifest.skipped


def test_a_mistake_in_a_source_ends_the_iteration_with_it_after_what_came_before(tmp_path, monkeypatch):
    folder = make_tars(tmp_path / "in", {"a": {"x": 5}, "b": {"y": 5}})
    real = VptSource.iter_episodes

    def mistaken(self, unit):
        if unit.name == "b.tar":
            raise RuntimeError("a mistake in our own code")
        yield from real(self, unit)

    seen = []
    decoders = decoders_of(folder)
    monkeypatch.setattr(VptSource, "iter_episodes", mistaken)
    with pytest.raises(RuntimeError, match="a mistake in our own code"), decoders as units:
        for unit, streams in units:
            seen.append(unit.name)
            seen += [len(list(stream)) for stream in streams]
    assert seen == ["a.tar", 5, "b.tar"]


def test_an_error_in_preprocessing_is_no_skip_but_stops(tmp_path, monkeypatch):
    folder = make_tars(tmp_path / "in", {"a": {"x": 60, "y": 60}})

    def broken(frames):
        raise RuntimeError("a mistake in our own code")

    monkeypatch.setattr(decoding, "luma_statistics", broken)
    with pytest.raises(RuntimeError, match="a mistake in our own code"):
        encode(folder, tmp_path / "cache")


def test_a_full_disk_is_named_and_the_same_command_continues_on_a_larger_one(tmp_path):
    folder = make_tars(tmp_path / "in", {"a": {"x": 60}, "b": {"y": 60}})
    alone = encode(folder, tmp_path / "alone").manifest
    pages = sum(
        -(-len(content) // 4096) for content in all_files(tmp_path / "alone").values()
    )  # tmpfs gives whole ones
    num_bytes = 4096 * pages
    with small_disk(tmp_path / "disk", num_bytes * 3 // 4) as disk:
        with pytest.raises(
            DiskFullError, match=rf"No space left on device: {disk}/root/tokens/.* cannot be written, .* free there"
        ):
            encode(folder, disk / "root")
        assert len(list(disk.glob("root/tokens/*/*.zarr"))) == 1 and not list(disk.rglob(".jepa-cache-*"))
        subprocess.run(["mount", "-o", f"remount,size={num_bytes * 3}", str(disk)], check=True)
        result = encode(folder, disk / "root")
    assert result.manifest == alone and result.num_encoded == 1


def test_after_a_failed_write_no_other_call_is_made():
    made, gate = [], threading.Event()

    def fail():
        gate.wait(10)
        raise OSError("full")

    with pytest.raises(OSError, match="full"), WriterThread() as write:
        write(fail)
        for number in range(3):
            write(made.append, number)
        gate.set()
    assert made == []


def decoders_of(folder, num_decoders=2):
    config = tiny_config(batch_size=1, decoder="pyav", num_decoders=num_decoders, fps=20.0)
    (group,), _ = scan_units(config, [str(folder)], folder)
    units = sorted(group.units, key=lambda unit: unit.name)
    return Decoders(group, units, lambda frames: torch.zeros(len(frames), 3, 2, 2))


@pytest.mark.parametrize("stop_after", [0, 1, 2])
@pytest.mark.parametrize("num_decoders", [1, 3])
def test_a_consumer_that_stops_early_is_never_waited_for(tmp_path, stop_after, num_decoders):
    folder = make_tars(tmp_path / "in", {"a": dict.fromkeys("uvwxyz", 60)})
    with decoders_of(folder, num_decoders) as units:
        _, streams = next(iter(units))
        for number, stream in enumerate(streams):
            if number == stop_after:
                next(iter(stream))  # one of its sixty batches
                break
            assert len(list(stream)) == 60


def test_memory_is_bounded_while_the_consumer_waits(tmp_path):
    folder = make_tars(tmp_path / "in", {"a": dict.fromkeys("uvwxyz", 60)})
    with decoders_of(folder) as units:
        _, streams = next(iter(units))
        stream = next(streams)
        threading.Event().wait(0.5)
        assert stream.batches.qsize() <= decoding.BATCHES_AHEAD
        assert units._items.qsize() <= 2


@pytest.mark.parametrize("num_decoders", [1, 4])
def test_streams_come_in_the_order_of_the_recordings_and_what_is_left_of_a_unit_is_dropped(tmp_path, num_decoders):
    folder = make_tars(tmp_path / "in", {"a": {"u": 60, "v": 5, "w": 33}, "b": {"x": 8, "y": 60}})
    order = []
    with decoders_of(folder, num_decoders) as units:
        for unit, streams in units:
            for stream in streams:
                order.append((unit.name, stream.episode.key, sum(len(batch.pixels) for batch in stream)))
                if stream.episode.key == "v":
                    break
    assert order == [("a.tar", "u", 60), ("a.tar", "v", 5), ("b.tar", "x", 8), ("b.tar", "y", 60)]


def test_controls_are_read_by_no_thread_that_outlives_python(tmp_path):
    """One of Arrow's that dropped the file's bytes while Python ended with an error aborted it: exit code 134 for that error's 1."""
    with ControlsWriter(tmp_path / "controls.parquet") as writer:
        writer.append("x", {name: np.arange(100.0) for name in "abcdefgh"})
    code = (
        "import os, sys; from pathlib import Path; import pyarrow.parquet; from jepa_cache.store.controls import iter_controls\n"
        "count = lambda: len(os.listdir('/proc/self/task')); before = count()\n"
        "print(len(list(iter_controls(Path(sys.argv[1])))), count() - before)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "controls.parquet")], capture_output=True, text=True, check=True
    )
    assert result.stdout == "1 0\n"
