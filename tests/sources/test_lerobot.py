"""Claims: LeRobot v2.0, v2.1 and v3.0 give the frames and rows of each episode, from real files too.

Columns are chosen by name; rows are placed by their timestamps; what contradicts info.json or meta is skipped by name; a unit is another
one when meta says something else of its numbers; a hub id is fetched, and says what to do when it cannot be. Names of joints reach what shows
columns, and decide no store.
"""

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jepa_cache.actions import get_action_space
from jepa_cache.data.dataset import CachedDataset
from jepa_cache.episode import Episode, Skipped
from jepa_cache.media.video import open_video
from jepa_cache.sources import build_source
from jepa_cache.store.digests import DigestTable
from jepa_cache.store.root import CacheRoot
from tests.encoded import encode, store_json, tiniest_config
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
FIRST = "arm/data/chunk-000/episode_000000.parquet"


def read_all(folder, options=OPTIONS, inputs=(".",)):
    source = build_source("lerobot", options)
    return [item for unit in source.list_units(inputs, folder) for item in source.iter_episodes(unit)]


def read_frames(episode):
    with open_video(episode.video, first_frame=episode.first_frame) as video:
        return video.read(np.arange(len(episode.frame_ticks)))


def expect_skipped(folder, words, options=OPTIONS):
    (item,) = read_all(folder, options)
    assert isinstance(item, Skipped), item
    assert words in item.reason


def rewrite_rows(folder, num_rows=6, **columns):
    """Replace columns of the first episode of a v2 data set of six frames."""
    write_v2(folder / "arm", {0: 6})
    pq.write_table(pa.table({**make_rows(0, num_rows), **columns}), folder / FIRST)


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
def test_every_episode_has_its_frames_and_rows_in_every_version(tmp_path, version, monkeypatch):
    monkeypatch.setattr("jepa_cache.sources.parsers.untrusted.BATCH_ROWS", 7)  # fewer than an episode has
    lengths = {0: 90, 1: 33, 2: 9}
    if version == "v3.0":
        write_v3(tmp_path / "arm", [{0: 90, 1: 33}, {2: 9}])
    else:
        write_v2(tmp_path / "arm", lengths, version=version)
    episodes = read_all(tmp_path)
    assert [episode.key for episode in episodes] == [f"arm/episode_00000{index}" for index in range(3)]
    assert [episode.first_frame for episode in episodes] == [0, 90 * (version == "v3.0"), 0]
    for (index, length), episode in zip(lengths.items(), episodes, strict=True):
        assert episode.frame_ticks.tolist() == list(range(length))
        assert episode.num_ticks == episode.num_video_frames == length
        rows = make_rows(index, length)
        numbers = [np.stack(rows[column].to_pylist()) for column in ("action", "observation.state")]
        names = ["action_0", "action_1", "state_0", "state_1", "state_2"]
        assert sorted(episode.controls) == names
        np.testing.assert_array_equal(np.stack([episode.controls[name] for name in names], 1), np.hstack(numbers))
        with open_video(episode.video) as video:
            everything = video.read(np.arange(video.info.num_frames))
        np.testing.assert_array_equal(
            read_frames(episode), everything[episode.first_frame : episode.first_frame + length]
        )


def test_columns_are_chosen_by_index_slice_and_name(tmp_path):
    write_v2(tmp_path / "arm", {0: 6})
    options = {
        "camera": CAMERA,
        "actions": ["action[lift]", "observation.state[grip]"],
        "states": ["observation.state[1:]"],
        "columns": {"x_m": "observation.state[0]", "success": "is_episode_successful"},
    }
    (episode,) = read_all(tmp_path, options)
    rows, controls = make_rows(0, 6), episode.controls
    action, state = (np.stack(rows[name].to_pylist()) for name in ("action", "observation.state"))
    chosen = np.column_stack([action[:, 1], state[:, 2], state[:, 1:], state[:, 0]])
    names = ["action_0", "action_1", "state_0", "state_1", "x_m"]
    np.testing.assert_array_equal(np.column_stack([controls[name] for name in names]), chosen)
    assert controls["success"].dtype == bool and controls["success"].all()


def test_names_of_joints_are_shown_and_decide_no_store(tmp_path):
    write_v2(tmp_path / "arm", {0: 12, 1: 12})
    features = json.loads((tmp_path / "arm/meta/info.json").read_text())["features"]
    config = tiniest_config("lerobot")
    config = replace(config, members=((replace(config.dataset, source_options=OPTIONS), 1.0),))

    def encode_as(folder, names):
        features["action"]["names"] = names
        write_info(tmp_path / "arm", "v2.1", features=features)
        result = encode(tmp_path, tmp_path / folder, config, ["arm"])
        with closing(CachedDataset(result.manifest, CacheRoot(tmp_path / folder))) as dataset:
            names = {f'"{name}" as recorded' for name in dataset.column_names.values()}
            assert names == {
                column.unit for column in dataset.space.actions + dataset.space.states if '"' in column.unit
            }
            return result, {column.name: column.unit for column in (*dataset.space.actions, *dataset.space.states)}

    first, units = encode_as("first", ["radius\x1b$", "lift"])
    assert units["action_0"] == '"radius\\x1b" as recorded' and units["state_2"] == '"grip" as recorded'
    assert first.manifest.action_space == "vector_last2x3"
    second, units = encode_as("second", ["one of how many?"])  # which of the numbers has it, nobody knows
    assert units["action_0"] == "as recorded, last row of the step" and units["state_2"] == '"grip" as recorded'
    assert second.manifest.to_bytes() == first.manifest.to_bytes()
    again, units = encode_as("first", ["other", "names"])  # as the data set had it when it was encoded
    assert again.num_encoded == 0 and units["action_1"] == '"lift" as recorded'
    for store in (tmp_path / "first").rglob("tokens/*/*.zarr"):
        with store_json(store) as document:
            del document["provenance"]["columns"]  # one of an earlier release
        # Already where one store does not know it.
        assert encode_as("first", ["pan", "lift"])[1]["action_1"] == "as recorded, last row of the step"


@pytest.mark.parametrize(
    ("actions", "words"),
    [
        ("action[2]", "has 2 numbers"),
        ("action[1:1]", "has 2 numbers"),
        ("action[lft]", "did you mean 'lift'"),
        ("actoin", "no column 'actoin'; it has observation.state, action"),
        ("task", "numbers"),
    ],
)
def test_a_selection_that_does_not_fit_is_the_reason_of_the_skip(tmp_path, actions, words):
    rewrite_rows(tmp_path, task=["x"] * 6)
    expect_skipped(tmp_path, words, {**OPTIONS, "actions": [actions]})


def test_a_selection_camera_or_input_that_is_none_is_refused_with_the_way_out(tmp_path):
    write_v2(tmp_path / "arm", {0: 6})
    (tmp_path / "empty").mkdir()
    info = tmp_path / "arm/meta/info.json"
    document = json.loads(info.read_text())
    document["features"]["observation.images.tobe"] = {"dtype": "video"}  # listed, and without videos
    info.write_text(json.dumps(document))
    near = r"did you mean 'observation\.images\.top'\? \(source_options\.camera; it lists (?!.*tobe).*observation\.images\.top"
    for options, words in (
        ({**OPTIONS, "actions": ["action[0"]}, "no selection"),
        ({"camera": CAMERA}, "nothing is selected"),
        ({**OPTIONS, "camera": "observation.images.tob"}, near),
        ({**OPTIONS, "camera": "observation.images.still"}, "only videos are read"),
    ):
        with pytest.raises(ValueError, match=words):
            read_all(tmp_path, options)
    for given in ("empty", "nowhere", "x-{000..002}"):
        with pytest.raises(ValueError, match=r"no meta/info\.json in or below it.*Give a data set's folder"):
            read_all(tmp_path, inputs=[given])


@pytest.mark.parametrize(
    ("times", "ticks", "words"),
    [
        (np.arange(12) / 20, [0, 2, 4, 6, 8, 10], "placed by time"),
        ((np.arange(6) + 1) / 10, [0, 1, 2, 3, 4, 5], "one by one"),
        ([0, 0.1, 0.05, 0.3, 0.4, 0.5], None, "go back"),
        ([0, 1, 2, 3, 4, 5], None, "rates must be wrong"),
        ([0.25, 0.3, 0.4, 0.5, 0.6, 0.7], None, "since its first frame"),
    ],
)
def test_rows_are_placed_by_their_times_and_times_that_cannot_be_skip_the_episode(tmp_path, times, ticks, words):
    rewrite_rows(tmp_path, len(times), timestamp=times)
    if ticks is None:
        expect_skipped(tmp_path, words)
        return
    (episode,) = read_all(tmp_path)
    assert episode.frame_ticks.tolist() == ticks and any(words in note for note in episode.notes)


def test_missing_files_and_a_video_of_another_rate_are_skipped_by_name_and_others_go_on(tmp_path):
    write_v2(tmp_path / "arm", dict.fromkeys(range(5), 6))
    data, videos = tmp_path / "arm/data/chunk-000", tmp_path / f"arm/videos/chunk-000/{CAMERA}"
    for index in (0, 2):
        (data / f"episode_00000{index}.parquet").unlink()
    for index in (1, 2):
        (videos / f"episode_00000{index}.mp4").unlink()
    (videos / "episode_000004.mp4").write_bytes(cached_video(6, 0, 20))
    items = {item.key[-1]: item for item in read_all(tmp_path)}
    assert len(items) == 5 and isinstance(items.pop("3"), Episode)
    words = {"0": "episode_000000.parquet is not there", "1": "episode_000001.mp4 is not there"}
    words |= {"2": "listed but not there", "4": "says 10 Hz, but its video runs at 20 Hz"}
    assert all(words[key] in item.reason for key, item in items.items())


VIDEO = f"videos/{CAMERA}"


def test_packed_episodes_and_rows_that_the_list_places_wrongly_are_skipped(tmp_path):
    write_v3(tmp_path / "arm", [dict.fromkeys(range(5), 6)])
    listed = read_list(tmp_path / "arm")
    listed[1][f"{VIDEO}/from_timestamp"] = 0.65
    listed[2][f"{VIDEO}/to_timestamp"] = 0.0
    listed[3] |= {f"{VIDEO}/from_timestamp": 5.0, f"{VIDEO}/to_timestamp": 5.6}
    listed[4]["episode_index"] = 7
    write_list(tmp_path / "arm", listed)
    first, *others = read_all(tmp_path)
    assert isinstance(first, Episode)
    words = (*["it must begin at one of its frames"] * 3, "not listed", "none of its rows")
    assert [item.key[-1] for item in others] == ["1", "2", "3", "4", "7"]
    assert all(text in item.reason for item, text in zip(others, words, strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"episode_index": 0}, "lists episode 0 twice"),
        ({f"{VIDEO}/from_timestamp": 0.3}, "gives episodes 0 and 1 the same frames"),
        ({f"{VIDEO}/from_timestamp": 0.55, f"{VIDEO}/to_timestamp": 1.2}, None),  # by float error, say
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


def test_data_sets_that_contradict_themselves_or_each_other_are_refused(tmp_path):
    write_v2(tmp_path / "a/arm", {0: 6, 1: 6})
    write_info(tmp_path / "a/arm", "v2.1", video_path="videos/all.mp4")
    with pytest.raises(ValueError, match="gives episodes 0 and 1 the same frames"):
        read_all(tmp_path)
    for folder in ("a/arm", "b/arm", "b/arm/more/hand"):
        write_v2(tmp_path / folder, {0: 6})
    with pytest.raises(ValueError, match="have one name"):
        read_all(tmp_path)
    inside = [item.key for item in read_all(tmp_path / "b")]
    assert inside == ["arm/episode_000000", "hand/episode_000000"], "a data set inside another has meta of its own"
    write_info(tmp_path / "c", "v1.6")
    with pytest.raises(ValueError, match=r"codebase_version: .* got 'v1\.6'"):
        read_all(tmp_path / "c")


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


@pytest.mark.parametrize("packed", [False, True])
def test_a_unit_is_another_when_meta_says_something_else_of_its_numbers_and_only_then(tmp_path, packed):
    root, options = tmp_path / "arm", {**OPTIONS, "actions": ["action[lift]"]}
    source = build_source("lerobot", options)

    def digests():
        return {unit.name: DigestTable().digest_unit(unit.files) for unit in source.list_units(["."], tmp_path)}

    def edit_info(**changes):
        path = root / "meta/info.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    write_v3(root, [{0: 6, 1: 6}]) if packed else write_v2(root, {0: 6, 1: 6})
    before = digests()
    contents = {path: path.read_bytes() for path in root.rglob("*.mp4")}
    write_v3(root, [{0: 6, 1: 6}, {2: 6}]) if packed else write_v2(root, {0: 6, 1: 6, 2: 6})
    assert all(path.read_bytes() == content for path, content in contents.items())
    assert before.items() <= digests().items() and len(digests()) == len(before) + 1, "one was added"
    edit_info(robot_type="another", total_episodes=7, splits={})
    assert before.items() <= digests().items(), "nothing of that decides a number"
    seen = [before]
    edit_info(fps=10.05)
    seen.append(digests())
    features = json.loads((root / "meta/info.json").read_text())["features"]
    edit_info(features={**features, "action": {**features["action"], "names": ["lift", "pan"]}})
    seen.append(digests())
    if packed:
        (unit, *_) = source.list_units(["."], tmp_path)
        assert [type(item) for item in source.iter_episodes(unit)] == [Episode, Episode]
        listed = read_list(root)
        listed[1][f"{VIDEO}/from_timestamp"] += 0.1
        write_list(root, listed)
        seen.append(digests())
        write_list(root, listed[:1])  # seen by the same source
        assert [type(item) for item in source.iter_episodes(unit)] == [Episode, Skipped]
    for name in before:
        assert len({found[name] for found in seen}) == len(seen)


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
    missing = [item.key for item in items if isinstance(item, Skipped)]
    assert missing == ["robot_sim.PickNPlace/episode_000003", "robot_sim.PickNPlace/episode_000004"]
    actions, states = get_action_space("vector_last7x7").aggregate(episodes[0].controls, episodes[0].frame_ticks[::4])
    assert actions.shape == (103, 7) and np.isfinite(actions).all() and np.isfinite(states).all()
