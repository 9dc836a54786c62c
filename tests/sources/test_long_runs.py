"""Claims: reading and decoding hundreds of recordings leaves neither memory nor open files behind, in any reader or decoder.

Counted is what the process holds (decoders, HDF5 and Arrow allocate outside of Python), after a run long enough to fill every
cache that has a bound. benchmarks/sources.py --long does the same over thousands.
"""

import gc
import os
from pathlib import Path

import numpy as np
import pytest

from jepa_cache.episode import Episode
from jepa_cache.media.video import open_video
from jepa_cache.sources import build_source
from tests.sources.lerobot_makers import cached_video
from tests.sources.test_contract import FOUND

NUM_RECORDINGS = 300
NUM_WRITTEN = 20
MIB = 1 << 20
MAX_GROWTH_BYTES = 12 * MIB
"""From a third of the way to its end: 60 kB a recording, ten times what one of these holds. glibc returns memory in pieces."""

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc, which only Linux has")


def held():
    """(resident bytes, open files) of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(list(Path("/proc/self/fd").iterdir()))


def check(early, late):
    assert late[0] - early[0] < MAX_GROWTH_BYTES, f"{(late[0] - early[0]) / MIB:.1f} MiB more are held"
    assert late[1] <= early[1], f"{late[1] - early[1]} more files are open"


@pytest.mark.parametrize("form", FOUND)
def test_hundreds_of_recordings_leave_nothing_behind(form, tmp_path):
    name, example = FOUND[form]
    example.write(tmp_path, range(NUM_WRITTEN))
    source = build_source(name, example.options)
    number, marks = 0, {}
    while number < NUM_RECORDINGS:
        for unit in source.list_units(["."], tmp_path):
            for recording in source.iter_episodes(unit):
                assert isinstance(recording, Episode)
                recording = None
                number += 1
                if number in (NUM_RECORDINGS // 3, NUM_RECORDINGS):
                    marks[number] = held()
    check(marks[NUM_RECORDINGS // 3], marks[NUM_RECORDINGS])


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_a_hundred_opened_videos_leave_nothing_behind(decoder, tmp_path):
    if decoder == "decord":
        pytest.importorskip("decord")
    (tmp_path / "shared.mp4").write_bytes(cached_video(90, 0))
    marks = []
    for number in range(1, 151):
        given, first_frame = (cached_video(90, 0), 0) if number % 2 else (tmp_path / "shared.mp4", 70)
        with open_video(given, decoder, first_frame=first_frame) as video:
            video.read(np.arange(2))
        if number in (50, 150):
            marks.append(held())
    check(*marks)
