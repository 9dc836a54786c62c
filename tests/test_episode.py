"""Claims of episode.py: an episode whose shapes, order or ranges are wrong cannot be made, and the error names it."""

import numpy as np
import pytest

from jepa_cache.episode import Episode

GOOD = {
    "key": "seg",
    "video": b"",
    "fps": 20.0,
    "controls": {"tick": np.arange(5), "gui": np.zeros(5, bool)},
    "frame_ticks": np.array([0, 0, 2, 4]),
    "num_video_frames": 6,
}


def test_a_consistent_episode_is_made():
    assert Episode(**GOOD).num_ticks == 5


@pytest.mark.parametrize(
    "wrong",
    [
        {"fps": 0.0},
        {"fps": float("nan")},
        {"controls": {}},
        {"controls": {"tick": np.arange(5), "gui": np.zeros(4, bool)}},
        {"controls": {"pose": np.zeros((5, 7))}},
        {"frame_ticks": np.array([0, 2, 1])},
        {"frame_ticks": np.array([0, 5])},
        {"frame_ticks": np.array([-1, 2])},
        {"frame_ticks": np.array([0.0, 1.0])},
        {"frame_ticks": np.array([], np.int64)},
        {"num_video_frames": 3},
    ],
)
def test_an_inconsistent_episode_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match="'seg'"):
        Episode(**{**GOOD, **wrong})


def test_an_episode_without_a_key_is_refused():
    with pytest.raises(ValueError, match="needs a key"):
        Episode(**{**GOOD, "key": ""})
