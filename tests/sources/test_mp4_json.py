"""Claims: a folder of mp4 and json pairs becomes episodes, whatever is missing or wrong is said, and nothing else is read."""

import json

import numpy as np
import pytest

from jepa_cache.actions import get_action_space
from jepa_cache.episode import Episode, Skipped
from jepa_cache.sources import build_source
from tests.sources.lerobot_makers import cached_video

ACTIONS = [[0.25 * row, -1.0] for row in range(12)]
STATES = [[float(row), 2.0 * row] for row in range(12)]


def write_pair(folder, name="push", video=True, **fields):
    folder.mkdir(parents=True, exist_ok=True)
    records = {"fps": 10, "actions": ACTIONS, "states": STATES, **fields}
    (folder / f"{name}.json").write_text(
        json.dumps({key: value for key, value in records.items() if value is not None})
    )
    if video:
        (folder / f"{name}.mp4").write_bytes(cached_video(12, 0))
    return folder


def read_all(folder):
    source = build_source("mp4_json", {})
    return [item for unit in source.list_units(["."], folder) for item in source.iter_episodes(unit)]


def read_one(folder):
    (item,) = read_all(folder)
    return item


def test_a_pair_gives_its_columns_and_a_row_for_each_frame(tmp_path):
    episode = read_one(write_pair(tmp_path / "table", instruction="push the block", success=True))
    assert episode.key == "table/push" and not episode.notes
    assert np.array_equal(episode.frame_ticks, np.arange(12))
    assert np.array_equal(np.stack([episode.controls["action_0"], episode.controls["action_1"]], axis=1), ACTIONS)
    assert np.array_equal(np.stack([episode.controls["state_0"], episode.controls["state_1"]], axis=1), STATES)
    assert episode.controls["success"].dtype == bool and episode.controls["success"].all()
    assert "success" not in read_one(write_pair(tmp_path / "other")).controls
    actions, states = get_action_space("vector_sum2x2").aggregate(episode.controls, episode.frame_ticks[::4])
    assert actions.tolist() == [[0.25 * (0 + 1 + 2 + 3), -4.0], [0.25 * (4 + 5 + 6 + 7), -4.0]]
    assert states.tolist() == [STATES[0], STATES[4], STATES[8]]


def test_the_last_state_needs_no_action(tmp_path):
    episode = read_one(write_pair(tmp_path / "table", actions=ACTIONS[:-1]))
    for space in ("vector_sum2x2", "vector_last2x2"):
        actions, _ = get_action_space(space).aggregate(episode.controls, episode.frame_ticks)
        assert actions.shape == (11, 2) and np.isfinite(actions).all()


def test_rows_are_placed_by_their_rate_or_by_times_in_its_place(tmp_path):
    episode = read_one(write_pair(tmp_path / "table", fps=20, actions=ACTIONS + ACTIONS, states=STATES + STATES))
    assert episode.frame_ticks.tolist() == list(range(0, 24, 2))
    times = [0.1 * row + (0.03 if row == 5 else 0.0) for row in range(12)]
    episode = read_one(write_pair(tmp_path / "times", times=times, fps=None))
    assert episode.frame_ticks.tolist() == list(range(12)) and episode.frame_times_s.tolist() == times


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"fps": None}, "field fps, rows per second, is missing"),
        ({"fps": 0.0, "times": [0.1 * row for row in range(12)]}, "fps: Input should be greater than 0; got 0.0"),
        ({"fps": "10"}, "fps: Input should be a valid number"),
        ({"states": None}, "the field states is missing; it holds 'fps', 'actions'"),
        ({"actions": ACTIONS[:-2]}, "10 actions and 12 states"),
        ({"actions": [1.0] * 12}, "rows of equal length"),
        ({"actions": [[1.0], [1.0, 2.0]] * 6}, "rows of equal length"),
        ({"actions": [[10**400, 1]] * 12}, "rows of equal length"),
        ({"states": [[float("nan"), 0.0]] * 12}, "must be finite; row 0"),
        ({"times": [0.0, 0.1]}, "2 times and 12 states"),
        ({"success": 1}, "success: Input should be a valid boolean"),
    ],
)
def test_what_is_wrong_in_the_json_is_the_reason_of_the_skip(tmp_path, fields, words):
    item = read_one(write_pair(tmp_path / "table", **fields))
    assert isinstance(item, Skipped), item
    assert words in item.reason


def test_a_file_without_its_partner_is_skipped_by_name_and_either_file_names_the_pair(tmp_path):
    write_pair(tmp_path / "table", "a")
    write_pair(tmp_path / "table", "b", video=False)
    (tmp_path / "table" / "c.mp4").write_bytes(cached_video(12, 0))
    items = read_all(tmp_path)
    assert [type(item) for item in items] == [Episode, Skipped, Skipped]
    assert "no b.mp4" in items[1].reason and "no c.json" in items[2].reason
    source = build_source("mp4_json", {})
    by_video, by_json = (source.list_units([f"table/a.{suffix}"], tmp_path) for suffix in ("mp4", "json"))
    assert by_video == by_json
    assert [path.name for path in by_video[0].files] == ["a.json", "a.mp4"]
    write_pair(tmp_path / "again" / "table", "a")
    with pytest.raises(ValueError, match="have one key, 'table/a'"):
        read_all(tmp_path)
