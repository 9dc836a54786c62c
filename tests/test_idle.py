"""Claims of idle.py: openpi's rule gives the known ranges on real episodes; lists of ranges are read and checked."""

import json

import numpy as np
import pytest

from jepa_cache.idle import find_episode_key, idle_ranges, read_ranges
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


def make_commands(*runs, joint=2):
    """Commands [M, 7] of which one joint changes in the active rows, by the smallest step that counts."""
    active = np.concatenate([np.full(length, not idle) for length, idle in runs])
    commands = np.full((len(active), 7), 3.0)
    commands[:, joint] += np.cumsum(np.where(active, 0.0011, 0.0009 * (-1) ** np.arange(len(active))))
    return commands


@pytest.mark.skipif(not REAL_DROID.exists(), reason="no real recordings in ../shared/data/droid")
@pytest.mark.parametrize("name", KNOWN)
def test_the_rule_gives_the_known_ranges_on_real_episodes(name):
    data = json.loads((REAL_DROID / "annotation" / f"{name}.json").read_text())
    assert idle_ranges(np.array(data["action.joint_velocity"])) == KNOWN[name]


@pytest.mark.parametrize(
    ("runs", "cut_end", "expected"),
    [
        (((20, False), (6, True), (20, False)), 0, [(0, 46)]),
        (((20, False), (7, True), (20, False)), 0, [(0, 20), (27, 47)]),
        (((8, True), (15, False), (9, True)), 0, []),
        (((8, True), (16, False), (9, True)), 0, [(8, 24)]),  # row 0 is never idle, so seven are
        (((7, True), (16, False), (9, True)), 0, [(0, 23)]),
        (((20, False), (9, True), (30, False)), 10, [(0, 10), (29, 49)]),
        (((20, False), (9, True), (30, False)), 20, [(29, 39)]),
        (((0, False),), 10, []),
    ],
)
def test_seven_unchanged_commands_are_a_rest_and_sixteen_changing_ones_are_kept_less_the_cut(runs, cut_end, expected):
    for joint in range(7):
        assert idle_ranges(make_commands(*runs, joint=joint), cut_end=cut_end) == expected


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
