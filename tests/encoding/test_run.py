"""Claims: the cache holds what the encoder gives on the decoded frames, bit for bit, with the right tables, actions and controls.

A GPU that is not there is refused where something is left to encode, and only there; the manifest from before stays in use.
The same recordings give the same bytes everywhere, whatever files they lie in and however many threads decode them.
Steps at another rate than asked are said, and the cache has the true one.
"""

import json
import shutil
import socket

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from jepa_cache.actions import get_action_space
from jepa_cache.config.loading import load_config
from jepa_cache.config.parsing import ConfigError
from jepa_cache.data.dataset import CachedDataset
from jepa_cache.encoder.frozen import FrozenEncoder, load_module
from jepa_cache.encoding import pipeline
from jepa_cache.encoding.run import describe_result, encode_dataset, join_alike
from jepa_cache.encoding.steps import describe_slower
from jepa_cache.store import digests, layout
from jepa_cache.store.controls import iter_controls
from jepa_cache.store.layout import check_store
from jepa_cache.store.manifest import replaced, why_held_back
from jepa_cache.store.root import CacheRoot
from tests.encoded import (
    BATCH,
    STRIDE,
    all_files,
    decode_all,
    encode,
    make_tars,
    make_tiny_tar,
    plan_steps,
    read_episodes,
    read_video,
    tiniest_config,
    tiny_config,
)
from tests.makers import make_rows, make_video, to_jsonl, write_vpt_tar
from tests.workspace import SUITE_SETTINGS

EPISODES = {"a": {"x": 61, "sub/y": 44}, "b": {"z": 52}}
SEEDS = {"x": (61, 0), "sub/y": (44, 1), "z": (52, 2)}
MODES = {"frame": 1, "tubelet": 2, "clip": 4}  # frames of an input


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tars(tmp_path_factory.mktemp("recordings"), EPISODES)


@pytest.fixture(scope="module")
def encoded(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("encoded") / "cache"
    return encode(folder, root), root


@pytest.fixture(scope="module")
def encoder():
    preset = tiny_config().encoder
    return FrozenEncoder(preset, load_module(preset, None), device="cpu", compute_dtype="float32")


@pytest.fixture(scope="module", params=MODES)
def in_mode(request, folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("mode") / "cache"
    return request.param, encode(folder, root, tiny_config(mode=request.param, frames_per_clip=4)), root


def reference_tokens(encoder, video, group):
    """Sampled frames, grouped, encoded in batches of BATCH groups, cast to float16."""
    frames = decode_all(video)[::STRIDE]
    frames = frames[: len(frames) // group * group]
    groups = encoder.preprocess(frames).unflatten(0, (-1, group))
    return torch.cat([encoder.encode(part).flatten(0, 1) for part in groups.split(BATCH)]).half().numpy()


def test_tokens_are_the_encoder_s_output_on_the_decoded_frames_bit_for_bit(folder, in_mode, encoder):
    mode, result, root = in_mode
    episodes = read_episodes(result, root)
    assert episodes.keys() == SEEDS.keys()
    for key in SEEDS:
        expected = reference_tokens(encoder, read_video(folder, key), MODES[mode])
        assert np.array_equal(episodes[key]["tokens"], expected), key


def test_steps_and_segments_say_which_frame_and_tick_each_step_shows(in_mode):
    mode, result, root = in_mode
    for entry in result.manifest.entries:
        store = CacheRoot(root).tokens(result.manifest.fingerprint, entry.unit_digest)
        steps, segments = (
            pq.read_table(store / name).to_pylist() for name in (layout.STEPS_FILE, layout.SEGMENTS_FILE)
        )
        expected_steps, expected_segments = [], []
        for key in [key for tar in EPISODES.values() for key in tar if any(row["episode"] == key for row in segments)]:
            plan = plan_steps(SEEDS[key][0], 20.0, mode=mode, frames_per_clip=4)
            for start, stop in plan.segments.tolist():
                number, first = len(expected_segments), len(expected_steps)
                expected_steps += [(number, frame, frame) for frame in plan.anchors[start:stop]]
                expected_segments.append((number, key, first, len(expected_steps), plan.step_hz))
        assert [tuple(row.values()) for row in segments] == expected_segments
        assert [(row["segment"], row["frame"], row["tick"]) for row in steps] == expected_steps
        assert (entry.num_steps, entry.num_segments) == (len(steps), len(segments))
    assert result.manifest.comparable == (mode != "clip")


def test_gui_idle_and_luma_are_those_of_the_recording(tmp_path):
    rows = make_rows(49, 3)
    for row in rows[20:30]:
        row["isGuiOpen"] = True
    for row in rows[8:14]:
        row["mouse"].update(dx=0.0, dy=0.0)
        row["keyboard"]["keys"] = []
    yaw = 0.0
    for row in rows:
        row["yaw"] = yaw
        yaw += 0.0 if row["isGuiOpen"] else 0.15 * row["mouse"]["dx"]
    video = make_video(49, 3)
    write_vpt_tar(tmp_path / "in/a.tar", {"k": (video, to_jsonl(rows))})
    steps = read_episodes(encode(tmp_path / "in", tmp_path / "cache"), tmp_path / "cache")["k"]
    assert steps["gui"].tolist() == [20 <= tick < 30 for tick in range(0, 49, STRIDE)]
    still = np.array([not (row["mouse"]["dx"] or row["mouse"]["dy"] or row["keyboard"]["keys"]) for row in rows], float)
    shares = [still[tick : tick + STRIDE].mean() for tick in range(0, 48, STRIDE)]
    assert steps["idle"][:-1] == pytest.approx(shares) and np.isnan(steps["idle"][-1])
    assert steps["idle"][2] == 1.0 and min(shares) < 1.0
    luma = decode_all(video)[::STRIDE].astype(np.float64) @ [0.299, 0.587, 0.114]
    # A sixteenth of the pixels is looked at; the test pictures are 8x8 blocks, so mean and deviation hardly change.
    assert steps["luma_mean"] == pytest.approx(luma.mean(axis=(1, 2)), abs=6)
    assert steps["luma_std"] == pytest.approx(luma.std(axis=(1, 2)), abs=6)
    assert np.ptp(luma.mean(axis=(1, 2))) > 6


def test_actions_are_summed_up_between_the_anchors_and_end_each_segment_with_nan(folder, in_mode):
    mode, _, root = in_mode
    space, config = get_action_space("vpt36"), tiny_config(mode=mode, frames_per_clip=4, action_space="vpt36")
    result = encode(folder, root, config)
    controls = {key: columns for path in root.glob("controls/*/*") for key, columns in iter_controls(path)}
    for key, episode in read_episodes(result, root).items():
        for segment in np.unique(episode["segment"]):
            rows = episode["segment"] == segment
            expected, actions = space.aggregate(controls[key], episode["tick"][rows]), episode["actions"][rows]
            assert np.array_equal(actions[:-1], expected.actions) and np.isnan(actions[-1]).all()
            assert np.array_equal(episode["states"][rows], expected.states)


def test_the_same_recordings_give_the_same_bytes_under_other_names_in_another_order_and_place_by_one_thread(
    folder, encoded, tmp_path, capsys
):
    (tmp_path / "deep").mkdir()
    shutil.copy(folder / "a.tar", tmp_path / "deep/zz.tar")
    for name in ("0.tar", "two.tar"):
        shutil.copy(folder / "b.tar", tmp_path / name)
    config = tiny_config(num_decoders=1)
    result = encode(tmp_path, tmp_path / "cache", config, inputs=[str(tmp_path / "deep"), "0.tar", "two.tar"])
    assert result.manifest.to_bytes() == encoded[0].manifest.to_bytes() and result.num_units == 2
    assert all_files(tmp_path / "cache") == all_files(encoded[1])
    assert "two.tar has the same content as" in capsys.readouterr().out


def test_the_manifest_lists_whole_stores_by_digest_with_their_recipe_and_native_controls_and_names_no_place(
    folder, encoded
):
    result, root = encoded
    manifest, cache, kept = result.manifest, CacheRoot(root), {}
    (part,) = manifest.parts
    for entry in part.entries:
        tokens = check_store(cache.tokens(manifest.fingerprint, entry.unit_digest), read_data=True)
        actions = check_store(cache.actions(manifest.action_fingerprint, entry.unit_digest), read_data=True)
        assert (tokens.digest, actions.digest) == (entry.tokens_digest, entry.actions_digest)
        assert tokens.metadata["recipe"] == manifest.recipe and tokens.provenance["device"] == "cpu"
        assert sum(tokens.provenance["decoders"].values()) == entry.num_episodes
        kept |= dict(iter_controls(cache.controls(part.source_fingerprint, entry.unit_digest)))
    assert (manifest.encoder_trained, manifest.grid, manifest.num_tokens, manifest.width) == (False, (4, 4), 16, 64)
    assert manifest.skipped == ()
    assert result.timing.num_frames == manifest.num_steps and result.timing.num_episodes == 3
    assert kept.keys() == SEEDS.keys()
    for key, controls in kept.items():
        rows = make_rows(*SEEDS[key])
        assert controls["mouse_dx"].tolist() == [row["mouse"]["dx"] for row in rows]
        assert controls["forward"].tolist() == ["key.keyboard.w" in row["keyboard"]["keys"] for row in rows]
    for name, content in all_files(root).items():
        for text in (str(folder), str(root.parent), socket.gethostname(), "a.tar", "b.tar"):
            assert text.encode() not in content, f"{name} holds {text!r}"


def test_steps_at_another_rate_than_asked_are_said_and_found_in_the_cache(tmp_path):
    rows = [[row * 0.1] for row in range(30)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.mp4").write_bytes(make_video(30, fps=10))
    (tmp_path / "in/a.json").write_text(json.dumps({"fps": 10, "actions": rows, "states": rows}))
    for fps, made_hz, words in ((8, 5, "8 Hz asked, 5 Hz made (1 of 2 frames at 10 Hz)"), (5, 5, ""), (10, 10, "")):
        for mode, per_step in (("frame", 1), ("tubelet", 2)):
            for _ in range(2):
                result = encode(tmp_path / "in", tmp_path / "cache", tiniest_config("mp4_json", fps=fps, mode=mode))
                said = describe_result(result, CacheRoot(tmp_path / "cache"))
                assert said.count("asked") == said.count(words or "asked") == bool(words), said
            dataset = CachedDataset(result.manifest, CacheRoot(tmp_path / "cache"))
            assert dataset.step_rates(dataset.segments) == (made_hz / per_step,) * 3
    told = describe_slower([(50.0, 11), (60.0, 13), (10.0, 2), (15.0, 3), (10.0, 2)], 5.0)
    assert told.count(" made (") == 3 and ", 1 other rates" in told and not describe_slower([], 5.0)


def test_implausible_values_are_said_by_every_run_and_are_no_part_of_what_is_stored(tmp_path, monkeypatch):
    rows = [[row * 0.1, 1e9 if row == 7 else row] for row in range(30)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.mp4").write_bytes(make_video(30))
    (tmp_path / "in/a.json").write_text(json.dumps({"fps": 20, "actions": rows, "states": rows}))
    config = tiniest_config("mp4_json", phases=(0, 1))
    for _ in range(2):
        result = encode(tmp_path / "in", tmp_path / "cache", config)
        said = describe_result(result, CacheRoot(tmp_path / "cache"))
        assert said.count("implausible: in/a: action_1 is 1e+09 at row 7") == 1
    monkeypatch.setattr(pipeline, "find_implausible", lambda controls: ())
    unseen = encode(tmp_path / "in", tmp_path / "other", config)
    assert not unseen.implausible and unseen.manifest == result.manifest


def test_a_gpu_that_is_not_there_is_refused_where_it_is_needed_and_the_manifest_from_before_stays_in_use(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    output, root = tmp_path / "out/manifest.json", CacheRoot(tmp_path / "cache")

    def encode_on(device):
        encode_dataset(tiniest_config(device=device), [str(folder)], base=tmp_path, root=root, output=output)
        return output.read_bytes()

    folder = make_tiny_tar(tmp_path / "in", "a", 0)
    before = encode_on("cpu")
    assert encode_on("cuda") == before, "all is in the cache, no device is needed"
    make_tiny_tar(folder, "b", 1)
    for failed_before in (False, True):
        if failed_before:
            with pytest.raises(ValueError, match="no earlier failure"), replaced(output):
                raise ValueError("no earlier failure is forgotten")
        with pytest.raises(ConfigError, match=r"encode\.device is 'cuda', but torch finds no GPU here"):
            encode_on("cuda")
        assert (why_held_back(output) is not None) == failed_before and output.read_bytes() == before
    assert encode_on("cpu") != before and why_held_back(output) is None


def test_only_the_first_units_are_read_and_the_whole_data_set_finds_them_again(tmp_path, monkeypatch):
    folder, root = tmp_path / "in", tmp_path / "cache"
    for seed, name in enumerate("abc"):
        make_tiny_tar(folder, name, seed)
    read, real = [], digests.file_digest
    monkeypatch.setattr(digests, "file_digest", lambda path: read.append(path.name) or real(path))
    part = encode(folder, root, tiniest_config(max_units=2))
    assert part.num_encoded == 2 and {name for name in read if name.endswith(".tar")} == {"a.tar", "b.tar"}
    assert part.manifest.notes == ("encode.max_units is 2: 1 of 3 units were not read",)
    assert "note: encode.max_units is 2" in describe_result(part, CacheRoot(root))
    assert join_alike(["a: 5 Hz", "c", "b: 5 Hz", "", ""]) == ["a: 5 Hz (and so of 1 more)", "c"]
    whole = encode(folder, root, tiniest_config(max_units=3))
    assert whole.num_encoded == 1 and not whole.manifest.notes
    assert whole.manifest.to_bytes() == encode(folder, root, tiniest_config()).manifest.to_bytes()
    with pytest.raises(ConfigError, match="it is called 'max_units' now"):
        load_config(SUITE_SETTINGS, ["encode.max_episodes=3"])
