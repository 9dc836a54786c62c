"""Claims of idle.py: openpi's rule gives the known ranges on real episodes; lists of ranges are read and checked."""

import json

import numpy as np
import pytest

from jepa_cache.idle import find_episode_key, find_idle_rows, idle_ranges, keep_ranges, read_ranges
from tests.droid_makers import REAL_DROID

KNOWN = {
    "train/0": [(22, 157)],
    "train/1": [(0, 28), (45, 256)],
    "train/2": [(0, 115), (132, 385)],
    "train/3": [(0, 29), (47, 116), (134, 229)],
    "train/4": [(0, 360)],
    "train/5": [(13, 167)],
    "train/6": [(8, 99)],
    "val/1799": [(13, 111)],
    "val/18599": [(0, 196)],
}


def make_idle(*runs):
    return np.concatenate([np.full(length, value) for value, length in runs])


@pytest.mark.skipif(not REAL_DROID.exists(), reason="no real recordings in ../shared/data/droid")
@pytest.mark.parametrize("name", KNOWN)
def test_the_rule_gives_the_known_ranges_on_real_episodes(name):
    data = json.loads((REAL_DROID / "annotation" / f"{name}.json").read_text())
    assert idle_ranges(np.array(data["action.joint_velocity"])) == KNOWN[name]


def test_idle_is_an_unchanged_command_of_any_size_and_row_0_never_is():
    commands = np.full((5, 7), 3.0)
    commands[3:, 2] += 0.0011
    commands[4, 5] += 0.0009
    assert find_idle_rows(commands).tolist() == [False, True, True, False, True]


def test_one_moving_joint_is_enough_to_be_active():
    commands = np.zeros((2, 7))
    for joint in range(7):
        moved = commands.copy()
        moved[1, joint] = -0.01
        assert not find_idle_rows(moved).any()


def test_six_idle_rows_stay_and_seven_go():
    for length, expected in ((6, [(0, 46)]), (7, [(0, 20), (27, 47)])):
        assert keep_ranges(make_idle((False, 20), (True, length), (False, 20)), cut_end=0) == expected


def test_fifteen_active_rows_go_and_sixteen_stay():
    for length, expected in ((15, []), (16, [(7, 23)])):
        assert keep_ranges(make_idle((True, 7), (False, length), (True, 9)), cut_end=0) == expected


def test_the_cut_takes_the_end_of_every_kept_run_and_may_take_all_of_it():
    idle = make_idle((False, 20), (True, 9), (False, 30))
    assert keep_ranges(idle) == [(0, 10), (29, 49)]
    assert keep_ranges(idle, cut_end=20) == [(29, 39)]


def test_an_episode_without_rows_has_no_ranges():
    assert idle_ranges(np.zeros((0, 7))) == []


def test_published_ranges_are_found_by_the_key_that_rlds_and_raw_episodes_have(tmp_path):
    folder = "/nfs/r2d2/ILIAD/success/2023-04-21/Fri_Apr_21"
    name = f"{folder}/recordings/MP4--{folder}/trajectory.h5"
    path = tmp_path / "ranges.json"
    path.write_text(json.dumps({name: [[0, 28], [45, 256]], "other": []}))
    assert find_episode_key(name) == "ILIAD/success/2023-04-21/Fri_Apr_21"
    assert read_ranges(path) == {"ILIAD/success/2023-04-21/Fri_Apr_21": [(0, 28), (45, 256)], "other": []}


@pytest.mark.parametrize(
    "content", ["[1]", '{"a": [[3, 1]]}', '{"a": [[0, 1.5]]}', '{"a": [[-1, 2]]}', '{"a": 1}', "{", "[" * 100_000]
)
def test_what_is_no_list_of_ranges_is_refused(tmp_path, content):
    path = tmp_path / "ranges.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"ranges\.json"):
        read_ranges(path)
