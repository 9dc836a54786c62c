"""Claims of episode.py: an episode whose shapes, order or ranges are wrong cannot be made, and the error names it.

A value that its column's unit does not allow is named with column, row and question; sound recordings raise none.
"""

import re

import numpy as np
import pytest

from jepa_cache.episode import Episode, find_implausible
from jepa_cache.poses import COMMAND_CONTROLS, POSE_CONTROLS
from jepa_cache.sources.parsers.vpt_controls import read_contractor
from tests.makers import REAL_VPT, make_rows, to_jsonl

REAL = REAL_VPT.parent
NUM_ROWS = 90
GOOD = {
    "key": "seg",
    "video": b"",
    "fps": 20.0,
    "controls": {"tick": np.arange(5), "gui": np.zeros(5, bool)},
    "frame_ticks": np.array([0, 0, 2, 4]),
    "num_video_frames": 6,
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"fps": 0.0},
        {"controls": {}},
        {"controls": {"tick": np.arange(5), "gui": np.zeros(4, bool)}},
        {"frame_ticks": np.array([0, 2, 1])},
        {"frame_ticks": np.array([0, 5])},
        {"frame_ticks": np.array([0.0, 1.0])},
        {"frame_ticks": np.array([], np.int64)},
        {"num_video_frames": 3},
        {"first_frame": -1},
        {"frame_times_s": np.array([0.0, 1.0, 0.5, 2.0])},
    ],
)
def test_an_inconsistent_episode_is_refused_by_name(wrong):
    assert Episode(**GOOD).num_ticks == 5
    with pytest.raises(ValueError, match="'seg'"):
        Episode(**{**GOOD, **wrong})
    with pytest.raises(ValueError, match="needs a key"):
        Episode(**{**GOOD, "key": ""})


def make_arm(num_rows=NUM_ROWS):
    """A hand that moves by some centimetres a row and points down, so that its first angle jumps between pi and -pi."""
    rng = np.random.default_rng(0)
    poses = np.array([0.5, 0.1, 0.4, np.pi, 0, 0, 0]) + np.cumsum(rng.normal(0, 0.01, (num_rows, 7)), axis=0)
    poses[:, 3] = (poses[:, 3] + np.pi) % (2 * np.pi) - np.pi
    poses[:, 6] = np.repeat([0, 0.02, 0.97], num_rows // 3)
    controls = dict(
        zip((*POSE_CONTROLS, *COMMAND_CONTROLS), np.concatenate([poses, poses + 0.01], axis=1).T, strict=True)
    )
    return (
        controls
        | {f"action_{i}": column for i, column in enumerate(np.diff(poses, axis=0, append=np.nan).T)}
        | {f"state_{i}": column for i, column in enumerate(poses.T)}
    )


def make_game(num_rows=NUM_ROWS):
    controls = read_contractor(to_jsonl(make_rows(num_rows))).controls
    controls["mouse_dx"][:] = 0
    controls["mouse_dx"][40] = 1093.0  # one fast turn in a recording of rest
    return controls


@pytest.mark.parametrize("make", [make_arm, make_game])
@pytest.mark.parametrize("num_rows", [1, 3, NUM_ROWS])
def test_a_sound_recording_raises_nothing(make, num_rows):
    assert find_implausible({name: column[:num_rows] for name, column in make().items()}) == ()


@pytest.mark.parametrize(
    ("columns", "change", "words"),
    [
        (POSE_CONTROLS[3:6], np.degrees, r"^rx_rad, rz_rad reach -?\d+(\.\d+)? at row \d+: .*degrees\?$"),
        (COMMAND_CONTROLS[:3], lambda it: 1000 * it, "^command_x_m, command_y_m, command_z_m reach .*millimetres"),
        (["z_m"], lambda it: 100 * it, "^z_m reach .*centimetres"),
        (["gripper"], lambda it: np.round(255 * it), "^gripper reach 247 at row 60: .*0 to 255"),
        (["gripper"], lambda it: 100 * it, "^gripper reach 97 at row 60: .*percent"),
        (POSE_CONTROLS[:6], lambda it: np.where(np.arange(NUM_ROWS) < 50, it, it[50]), None),
        (
            POSE_CONTROLS[:6],
            lambda it: np.where(np.arange(NUM_ROWS) < 40, it, it[40]),
            "its pose stays .* for 50 of 90 rows",
        ),
        (POSE_CONTROLS[:6], np.zeros_like, "its pose stays exactly the same for 90 of 90 rows, at 0"),
        (POSE_CONTROLS[:6], lambda it: np.where(np.arange(NUM_ROWS) % 9, it, 0), "its pose is 0 .* in 10 of 90 rows"),
        (
            [f"state_{i}" for i in range(7)],
            lambda it: it * 0 + 3,
            "its states stay exactly the same for 90 of 90 rows: ",
        ),
        (["action_2"], lambda it: np.where(np.arange(NUM_ROWS) == 7, it.std() * 1e6, it), "^action_2 is .* at row 7, "),
        (
            ["state_6"],
            lambda it: np.where(np.arange(NUM_ROWS) % 30 == 7, -3.4e38, it),
            "^state_6 is -3.4e.38 at row 7, ",
        ),
    ],
)
def test_each_fault_is_named_once(columns, change, words):
    with np.errstate(invalid="ignore"):
        controls = make_arm() | {name: change(np.nan_to_num(make_arm()[name])) for name in columns}
    found = find_implausible(controls)
    assert len(found) == (words is not None)
    if words is not None:
        assert re.search(words, found[0]), found


def test_a_view_beyond_the_circle_and_a_huge_mouse_movement_are_named():
    controls = make_game()
    controls["pitch_deg"] = np.degrees(np.linspace(-90, 90, NUM_ROWS))
    controls["mouse_dy"][5] = 1e18
    assert [text.partition(" ")[0] for text in find_implausible(controls)] == ["pitch_deg", "mouse_dy"]
