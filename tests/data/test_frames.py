"""Claims of data/frames.py: the frames of windows are the ones that their steps were made of; what cannot be shown is said."""

import hashlib

import numpy as np
import pytest

from jepa_cache.data.dataset import Segment
from jepa_cache.data.frames import read_frames
from jepa_cache.media.video import open_video
from jepa_cache.store.digests import DigestTable
from tests.caches import TICKS_PER_STEP, make_cache
from tests.makers import make_vpt_pair, write_vpt_tar
from tests.workspace import copy_settings

NUM_STEPS = 12


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A cache whose one unit is a tar shard of videos, and the videos."""
    folder = copy_settings(tmp_path_factory.mktemp("frames"))
    pairs = {f"episode-{seed}": make_vpt_pair(NUM_STEPS * TICKS_PER_STEP, seed=seed) for seed in range(3)}
    tar = write_vpt_tar(folder / "shards/a.tar", pairs)
    cache = make_cache(folder, units={hashlib.sha256(tar.read_bytes()).hexdigest(): list(pairs)}, num_steps=NUM_STEPS)
    return cache, tar, {key: video for key, (video, _) in pairs.items()}


def test_frames_of_windows_that_overlap_are_those_of_their_steps_in_any_order(recorded):
    cache, tar, videos = recorded
    assert read_frames(cache.config, cache.dataset, cache.dataset.segments[:1]) == [None], "not yet on this machine"
    DigestTable().digest_unit([tar])
    runs = []
    for segment in cache.dataset.segments:
        runs += [segment._replace(start=segment.start + a, stop=segment.start + b) for a, b in ((5, 9), (2, 7), (5, 9))]
    runs = runs[::-1]
    starts = {segment.episode: segment.start for segment in cache.dataset.segments}
    for run, frames in zip(runs, read_frames(cache.config, cache.dataset, runs), strict=True):
        with open_video(videos[run.episode]) as video:
            expected = video.read((np.arange(run.start, run.stop) - starts[run.episode]) * TICKS_PER_STEP)
        np.testing.assert_array_equal(frames, expected)
    with pytest.raises(ValueError, match=r"a\.tar has the digest .* 'nobody', but does not hold it"):
        read_frames(cache.config, cache.dataset, [Segment(0, "nobody", 0, 4)])
