"""Claims: LeRobot v2.0, v2.1 and v3.0 give the frames and rows of each episode, from real files too.

Columns are chosen by name; rows are placed by their timestamps; what contradicts info.json or meta is skipped by name; a hub id is
fetched, and says what to do when it cannot be.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jepa_cache.actions import get_action_space
from jepa_cache.episode import Episode, Skipped
from jepa_cache.media.video import open_video
from jepa_cache.sources import build_source
from jepa_cache.store.digests import DigestTable
from tests.sources.lerobot_makers import (
    CAMERA,
    cached_video,
    make_rows,
    read_list,
    write_info,
    write_list,
    write_v2,
    write_v3,
)

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "other" / "lerobot_v2_gr1"
OPTIONS = {"camera": CAMERA, "actions": ["action"], "states": ["observation.state"]}


def read_all(folder, options=OPTIONS, inputs=(".",)):
    source = build_source("lerobot", options)
    return [item for unit in source.list_units(inputs, folder) for item in source.iter_episodes(unit)]


def read_frames(episode, decoder="auto"):
    with open_video(episode.video, decoder, first_frame=episode.first_frame) as video:
        return video.read(np.arange(len(episode.frame_ticks)))


def expect_skipped(folder, words, options=OPTIONS):
    (item,) = read_all(folder, options)
    assert isinstance(item, Skipped), item
    assert words in item.reason
    return item


@pytest.mark.parametrize("version", ["v2.0", "v2.1"])
def test_an_episode_of_v2_has_its_frames_and_rows(tmp_path, version):
    write_v2(tmp_path / "arm", {0: 12, 1: 9}, version=version)
    first, second = read_all(tmp_path)
    assert [first.key, second.key] == ["arm/episode_000000", "arm/episode_000001"]
    assert len(second.frame_ticks) == second.num_ticks == second.num_video_frames == 9
    rows = make_rows(1, 9)
    for prefix, column in (("action", "action"), ("state", "observation.state")):
        for index, values in enumerate(np.stack(rows[column].to_pylist()).T):
            assert np.array_equal(second.controls[f"{prefix}_{index}"], values)
    assert sorted(second.controls) == ["action_0", "action_1", "state_0", "state_1", "state_2"]


def test_the_episodes_of_a_packed_file_have_their_own_frames_and_rows(tmp_path):
    write_v3(tmp_path / "arm", [{0: 90, 1: 33, 2: 40}, {3: 10}])
    episodes = read_all(tmp_path)
    assert [(episode.first_frame, len(episode.frame_ticks)) for episode in episodes] == [
        (0, 90),
        (90, 33),
        (123, 40),
        (0, 10),
    ]
    with open_video(episodes[0].video, "pyav") as video:
        everything = video.read(np.arange(163))
    for episode in episodes[:3]:
        stop = episode.first_frame + len(episode.frame_ticks)
        for decoder in ("auto", "pyav"):
            assert np.array_equal(read_frames(episode, decoder), everything[episode.first_frame : stop])
    for index, episode in enumerate(episodes):
        state = np.stack(make_rows(index, episode.num_ticks)["observation.state"].to_pylist())
        assert np.array_equal(episode.controls["state_2"], state[:, 2])
        assert np.array_equal(episode.frame_ticks, np.arange(episode.num_ticks))


def test_packed_and_single_files_give_the_same_controls(tmp_path):
    write_v2(tmp_path / "single", {0: 12, 1: 9})
    write_v3(tmp_path / "packed", [{0: 12, 1: 9}])
    for one, other in zip(read_all(tmp_path, inputs=["single"]), read_all(tmp_path, inputs=["packed"]), strict=True):
        assert np.array_equal(one.frame_ticks, other.frame_ticks)
        assert all(np.array_equal(column, other.controls[name]) for name, column in one.controls.items())


def test_av1_videos_are_read(tmp_path):
    write_v3(tmp_path / "arm", [{0: 70, 1: 20}], codec="libsvtav1")
    _, second = read_all(tmp_path)
    frames = read_frames(second)
    with open_video(second.video) as video:
        assert np.array_equal(frames, video.read(np.arange(90))[70:])


def test_a_unit_of_a_packed_data_set_is_a_parquet_file_and_its_videos(tmp_path):
    write_v3(tmp_path / "arm", [{0: 5, 1: 5}, {2: 5}])
    units = build_source("lerobot", OPTIONS).list_units(["arm"], tmp_path)
    assert [[path.name for path in unit.files[:-1]] for unit in units] == [
        ["file-000.parquet", "file-000.mp4"],
        ["file-001.parquet", "file-001.mp4"],
    ]


def test_an_episode_longer_than_a_batch_of_rows_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("jepa_cache.sources.parsers.untrusted.BATCH_ROWS", 7)
    write_v3(tmp_path / "arm", [{0: 12, 1: 9, 2: 7}])
    assert [episode.num_ticks for episode in read_all(tmp_path)] == [12, 9, 7]


def test_columns_are_chosen_by_index_slice_and_name(tmp_path):
    write_v2(tmp_path / "arm", {0: 6})
    options = {
        "camera": CAMERA,
        "actions": ["action[lift]", "observation.state[grip]"],
        "states": ["observation.state[1:]"],
        "columns": {"x_m": "observation.state[0]", "success": "is_episode_successful"},
    }
    (episode,) = read_all(tmp_path, options)
    rows = make_rows(0, 6)
    action, state = (np.stack(rows[name].to_pylist()) for name in ("action", "observation.state"))
    assert np.array_equal(episode.controls["action_0"], action[:, 1])
    assert np.array_equal(episode.controls["action_1"], state[:, 2])
    assert np.array_equal(np.stack([episode.controls["state_0"], episode.controls["state_1"]], axis=1), state[:, 1:])
    assert np.array_equal(episode.controls["x_m"], state[:, 0])
    assert episode.controls["success"].dtype == bool and episode.controls["success"].all()


@pytest.mark.parametrize(
    ("actions", "words"),
    [
        ("action[2]", "has 2 numbers"),
        ("action[0:3]", "has 2 numbers"),
        ("action[1:1]", "has 2 numbers"),
        ("action[lft]", "did you mean 'lift'"),
        ("actoin", "no column 'actoin'; it has observation.state, action"),
        ("task", "numbers"),
    ],
)
def test_a_selection_that_does_not_fit_is_the_reason_of_the_skip(tmp_path, actions, words):
    write_v2(tmp_path / "arm", {0: 6})
    path = tmp_path / "arm/data/chunk-000/episode_000000.parquet"
    pq.write_table(pa.table({**make_rows(0, 6), "task": ["x"] * 6}), path)
    expect_skipped(tmp_path, words, {**OPTIONS, "actions": [actions]})


def test_a_selection_that_is_none_is_refused_when_the_source_is_built():
    with pytest.raises(ValueError, match="no selection"):
        build_source("lerobot", {**OPTIONS, "actions": ["action[0"]})
    with pytest.raises(ValueError, match="nothing is selected"):
        build_source("lerobot", {"camera": CAMERA})


def test_an_unknown_camera_is_refused_with_the_nearest(tmp_path):
    write_v2(tmp_path / "arm", {0: 6})
    with pytest.raises(
        ValueError,
        match=r"did you mean 'observation\.images\.top'.*source_options\.camera; it lists .*observation\.images\.top",
    ):
        read_all(tmp_path, {**OPTIONS, "camera": "observation.images.tob"})
    with pytest.raises(ValueError, match="only videos are read"):
        read_all(tmp_path, {**OPTIONS, "camera": "observation.images.still"})


def test_rows_at_another_rate_than_frames_are_placed_by_time(tmp_path):
    write_v2(tmp_path / "arm", {0: 6})
    rows = {**make_rows(0, 12), "timestamp": np.arange(12) / 20}
    pq.write_table(pa.table(rows), tmp_path / "arm/data/chunk-000/episode_000000.parquet")
    (episode,) = read_all(tmp_path)
    assert episode.frame_ticks.tolist() == [0, 2, 4, 6, 8, 10]
    assert any("placed by time" in note for note in episode.notes)


def test_rows_that_begin_a_frame_late_but_match_the_frames_are_taken_one_by_one(tmp_path):
    write_v2(tmp_path / "arm", {0: 6})
    rows = {**make_rows(0, 6), "timestamp": (np.arange(6) + 1) / 10}
    pq.write_table(pa.table(rows), tmp_path / "arm/data/chunk-000/episode_000000.parquet")
    (episode,) = read_all(tmp_path)
    assert episode.frame_ticks.tolist() == [0, 1, 2, 3, 4, 5]
    assert any("one by one" in note for note in episode.notes)


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ([0, 0.1, 0.05, 0.3, 0.4, 0.5], "go back"),
        ([0, 0.1, np.nan, 0.3, 0.4, 0.5], "finite"),
        ([7, 8, 9, 10, 11, 12], "since its first frame"),
        ([0, 1, 2, 3, 4, 5], "rates must be wrong"),
        ([0.25, 0.3, 0.4, 0.5, 0.6, 0.7], "since its first frame"),
    ],
)
def test_times_that_cannot_be_are_the_reason_of_the_skip(tmp_path, times, words):
    write_v2(tmp_path / "arm", {0: 6})
    pq.write_table(
        pa.table({**make_rows(0, 6), "timestamp": times}), tmp_path / "arm/data/chunk-000/episode_000000.parquet"
    )
    expect_skipped(tmp_path, words)


def test_a_video_of_another_rate_than_info_json_is_skipped(tmp_path):
    write_v2(tmp_path / "arm", {0: 6})
    (tmp_path / f"arm/videos/chunk-000/{CAMERA}/episode_000000.mp4").write_bytes(cached_video(6, 0, 20))
    expect_skipped(tmp_path, "says 10 Hz, but its video runs at 20 Hz")


def test_missing_files_are_skipped_by_name_and_others_go_on(tmp_path):
    write_v2(tmp_path / "arm", {0: 6, 1: 6, 2: 6, 3: 6})
    data, videos = tmp_path / "arm/data/chunk-000", tmp_path / f"arm/videos/chunk-000/{CAMERA}"
    (data / "episode_000000.parquet").unlink()
    (videos / "episode_000001.mp4").unlink()
    (data / "episode_000002.parquet").unlink()
    (videos / "episode_000002.mp4").unlink()
    items = {item.key: item for item in read_all(tmp_path)}
    assert len(items) == 4
    assert isinstance(items["arm/episode_000003"], Episode)
    assert "episode_000000.parquet is not there" in items["arm/episode_000000"].reason
    assert "episode_000001.mp4 is not there" in items["arm/episode_000001"].reason
    assert "listed but not there" in items["arm/episode_000002"].reason


def test_a_packed_episode_that_meta_places_wrongly_is_skipped(tmp_path):
    write_v3(tmp_path / "arm", [{0: 6, 1: 6, 2: 6, 3: 6}])
    listed = read_list(tmp_path / "arm")
    prefix = f"videos/{CAMERA}"
    listed[1][f"{prefix}/from_timestamp"] = 0.65
    listed[2][f"{prefix}/to_timestamp"] = 0.0
    listed[3] |= {f"{prefix}/from_timestamp": 5.0, f"{prefix}/to_timestamp": 5.6}
    write_list(tmp_path / "arm", listed)
    first, *others = read_all(tmp_path)
    assert isinstance(first, Episode)
    for item, words in zip(others, ("between two frames", "places it from", "its video lasts"), strict=True):
        assert words in item.reason


def test_packed_rows_and_the_list_must_agree_on_the_episodes(tmp_path):
    write_v3(tmp_path / "arm", [{0: 6, 1: 6}])
    listed = read_list(tmp_path / "arm")
    listed[1]["episode_index"] = 7
    write_list(tmp_path / "arm", listed)
    first, unlisted, empty = read_all(tmp_path)
    assert isinstance(first, Episode)
    assert unlisted.key == "arm/episode_000001" and "not listed" in unlisted.reason
    assert empty.key == "arm/episode_000007" and "none of its rows" in empty.reason


def test_other_versions_are_refused(tmp_path):
    write_info(tmp_path / "arm", "v1.6")
    with pytest.raises(ValueError, match=r"codebase_version is 'v1\.6'"):
        read_all(tmp_path)


def test_two_data_sets_of_one_name_are_refused(tmp_path):
    write_v2(tmp_path / "a/arm", {0: 6})
    write_v2(tmp_path / "b/arm", {0: 6})
    with pytest.raises(ValueError, match="have one name"):
        read_all(tmp_path)


def test_a_hub_id_is_fetched_without_other_cameras_and_named_after_the_repository(tmp_path, monkeypatch):
    calls = []

    def snapshot_download(repo_id, **options):
        calls.append((repo_id, options))
        return str(write_v2(tmp_path / "datasets--me--pick-up/snapshots/abc", {0: 6}))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    (episode,) = read_all(tmp_path, inputs=["hub:me/pick-up@v1.0"])
    assert episode.key == "me/pick-up/episode_000000"
    ((repo_id, options),) = calls
    assert (repo_id, options["repo_type"], options["revision"]) == ("me/pick-up", "dataset", "v1.0")
    assert options["allow_patterns"] == ["meta/*", "data/*", f"videos/*{CAMERA}/*"]


def test_without_network_the_message_says_how_to_get_the_data_set(tmp_path, monkeypatch):
    def snapshot_download(*_, **__):
        raise ConnectionError("name resolution failed")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match=r"name resolution failed.*hf download --repo-type dataset me/pick"):
        read_all(tmp_path, inputs=["hub:me/pick"])
    with pytest.raises(ValueError, match="write hub:owner/name"):
        read_all(tmp_path, inputs=["hub:../x"])


def test_a_change_of_meta_is_seen_by_the_same_source(tmp_path):
    write_v3(tmp_path / "arm", [{0: 6, 1: 6}])
    source = build_source("lerobot", OPTIONS)
    (unit,) = source.list_units(["."], tmp_path)
    assert all(isinstance(item, Episode) for item in source.iter_episodes(unit))
    write_list(tmp_path / "arm", read_list(tmp_path / "arm")[:1])
    assert [type(item) for item in source.iter_episodes(unit)] == [Episode, Skipped]


def unit_digests(folder, options=OPTIONS):
    units = build_source("lerobot", options).list_units(["."], folder)
    return {unit.name: DigestTable().digest_unit(unit.files) for unit in units}


def edit_info(root, edit):
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    edit(info)
    path.write_text(json.dumps(info))


@pytest.mark.parametrize("packed", [False, True])
def test_a_unit_is_another_when_meta_says_something_else_of_its_numbers(tmp_path, packed):
    root = tmp_path / "arm"
    write_v3(root, [{0: 6, 1: 6}]) if packed else write_v2(root, {0: 6, 1: 6})
    options = {**OPTIONS, "actions": ["action[lift]"]}
    seen = [unit_digests(tmp_path, options)]
    edit_info(root, lambda info: info.update(robot_type="another", total_episodes=7, splits={}))
    assert unit_digests(tmp_path, options) == seen[0], "nothing of that decides a number"
    edit_info(root, lambda info: info.update(fps=10.05))
    seen.append(unit_digests(tmp_path, options))
    edit_info(root, lambda info: info["features"]["action"].update(names=["lift", "pan"]))
    seen.append(unit_digests(tmp_path, options))
    if packed:
        listed = read_list(root)
        listed[1][f"videos/{CAMERA}/from_timestamp"] += 0.1
        write_list(root, listed)
        seen.append(unit_digests(tmp_path, options))
    for name in seen[0]:
        assert len({digests[name] for digests in seen}) == len(seen)


@pytest.mark.parametrize("packed", [False, True])
def test_episodes_that_are_added_leave_the_digests_of_the_others(tmp_path, packed):
    root = tmp_path / "arm"
    write_v3(root, [{0: 6, 1: 6}]) if packed else write_v2(root, {0: 6, 1: 6})
    before = unit_digests(tmp_path)
    contents = {path: path.read_bytes() for path in root.rglob("*.mp4")}
    write_v3(root, [{0: 6, 1: 6}, {2: 6}]) if packed else write_v2(root, {0: 6, 1: 6, 2: 6})
    assert all(path.read_bytes() == content for path, content in contents.items())
    after = unit_digests(tmp_path)
    assert before.items() <= after.items() and len(after) == len(before) + 1


def test_an_input_without_a_data_set_says_what_one_is(tmp_path):
    (tmp_path / "empty").mkdir()
    for given in ("empty", "nowhere", "x-{000..002}"):
        with pytest.raises(ValueError, match=r"no meta/info\.json in or below it.*Give a data set's folder") as caught:
            read_all(tmp_path, inputs=[given])
        assert ".tar" not in str(caught.value)


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real LeRobot data set in ../shared/data")
def test_the_real_data_set_gives_its_three_episodes_and_names_the_two_missing_ones():
    options = {
        "camera": "observation.images.ego_view",
        "actions": ["action[22:29]"],
        "states": ["observation.state[22:29]"],
    }
    items = read_all(REAL, options)
    episodes = [item for item in items if isinstance(item, Episode)]
    assert [len(episode.frame_ticks) for episode in episodes] == [416, 470, 470]
    assert [item.key for item in items if isinstance(item, Skipped)] == [
        "robot_sim.PickNPlace/episode_000003",
        "robot_sim.PickNPlace/episode_000004",
    ]
    actions, states = get_action_space("vector_last7x7").aggregate(episodes[0].controls, episodes[0].frame_ticks[::4])
    assert actions.shape == (103, 7) and np.isfinite(actions).all() and np.isfinite(states).all()


def test_a_data_set_in_another_data_sets_video_folder_is_found_by_its_own_meta(tmp_path):
    write_v2(tmp_path / "arm", {0: 6})
    write_v2(tmp_path / "arm/more/hand", {0: 6})
    assert [item.key for item in read_all(tmp_path)] == ["arm/episode_000000", "hand/episode_000000"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"episode_index": 0}, "lists episode 0 twice"),
        ({f"videos/{CAMERA}/from_timestamp": 0.3}, "gives episodes 0 and 1 the same frames"),
        ({f"videos/{CAMERA}/from_timestamp": 0.55, f"videos/{CAMERA}/to_timestamp": 1.2}, None),  # by float error, say
    ],
)
def test_a_list_that_gives_two_episodes_one_index_or_the_same_frames_is_refused(tmp_path, change, words):
    write_v3(tmp_path / "arm", [{0: 6, 1: 6}])
    listed = read_list(tmp_path / "arm")
    listed[1] |= change
    write_list(tmp_path / "arm", listed)
    if words is None:
        assert len(read_all(tmp_path)) == 2
        return
    with pytest.raises(ValueError, match=words):
        read_all(tmp_path)


def test_episodes_of_one_index_or_one_file_are_refused_in_the_older_layout_too(tmp_path):
    write_v2(tmp_path / "arm", {0: 6, 1: 6})
    path = tmp_path / "arm/meta/episodes.jsonl"
    lines = path.read_text()
    path.write_text(lines + lines.splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="lists episode 0 twice"):
        read_all(tmp_path)
    path.write_text(lines)
    write_info(tmp_path / "arm", "v2.1", video_path="videos/all.mp4")
    with pytest.raises(ValueError, match="gives episodes 0 and 1 the same frames"):
        read_all(tmp_path)
