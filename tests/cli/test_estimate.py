"""Claims of `jepa-cache estimate`: its steps are those that come out, its bytes within 5 %, in every stored dtype; no video is read.

It refuses what the disk cannot hold, gives hours only at a rate that was measured or given, and changes nothing. The operations are those
that torch counts in the true encoder and a true training step.
"""

import io
import json
import shutil
import tarfile
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jepa_cache.cli import estimate
from jepa_cache.cli.estimate import compare_runs, count_encoder, count_predictor
from jepa_cache.config.loading import load_config
from jepa_cache.encoder.vit import VisionTransformer, VisionTransformer21
from jepa_cache.predictor.model import ACPredictor
from jepa_cache.store.root import MARKER
from jepa_cache.training.losses import world_model_loss
from tests.makers import make_video, make_vpt_pair, write_vpt_tar
from tests.workspace import SUITE_SETTINGS

TOLERANCE = 0.05
CONFIG = load_config(SUITE_SETTINGS)


def _estimate(checkout, *arguments):
    return checkout.run("estimate", "--json", checkout.recordings, *arguments)


def _count(checkout):
    files = {name: content for name, content in checkout.files().items() if not name.startswith("manifests")}
    del files[MARKER]  # the root's own
    tokens = sum(len(content) for name, content in files.items() if name.startswith("tokens/"))
    return tokens, sum(map(len, files.values())), len(files)


@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
def test_what_is_estimated_is_what_comes_out(fresh, dtype):
    override = f"encode.dtype={dtype}"
    estimated = _estimate(fresh, override)
    assert estimated.code == 0 and not fresh.root.path.exists()
    fresh.encode(override)
    manifest, (tokens, total, num_files) = fresh.manifest, _count(fresh)
    assert estimated.document["all"] == estimated.document["to_do"]
    assert estimated.document["all"]["steps"] == estimated.document["all"]["frames"] == manifest.num_steps
    assert estimated.document["all"]["episodes"] == sum(entry.num_episodes for entry in manifest.entries)
    sizes = estimated.document["bytes"][dtype]
    # Three tiny stores, half of whose bytes are JSON and tables: at real widths it is nearer.
    assert sizes["tokens"] == pytest.approx(tokens, rel=TOLERANCE)
    assert sizes["total"] == pytest.approx(total, rel=TOLERANCE)
    assert sizes["files"] == num_files
    assert estimated.document["disk"]["needed_bytes"] >= sizes["total"]
    after = _estimate(fresh, override)
    assert after.document["to_do"]["steps"] == 0 and after.document["done"]["units"] == 3
    assert after.document["disk"]["needed_bytes"] == 0
    assert after.document["all"]["steps"] == manifest.num_steps
    assert after.document["bytes"][dtype]["tokens"] == pytest.approx(tokens, rel=TOLERANCE)


@pytest.mark.parametrize("mode", ["tubelet", "clip"])
def test_other_modes_are_estimated_as_they_come_out(fresh, mode):
    settings = [f"encode.mode={mode}", "encode.frames_per_clip=4", "train.window_steps=2", "train.auto_steps=1"]
    settings += ["evaluate.num_context_steps=1", "evaluate.horizon=1"]
    estimated = _estimate(fresh, *settings).document["all"]
    fresh.encode(*settings)
    assert estimated["steps"] == fresh.manifest.num_steps


def test_only_headers_of_videos_are_read(fresh, monkeypatch):
    """Of a video of a megabyte, whose header lies at its end, not more than a few buffers."""
    video = make_video(200, 3, size=(240, 320), codec="mpeg4", options={"b": "50000000", "g": "1"})
    write_vpt_tar(fresh.recordings / "big.tar", {"big": (video, b"{}\n")})
    num_read = Counter()

    def counted(file, size=-1):
        content = io.BufferedReader.read(file, size)
        num_read[file.name] += len(content)
        return content

    monkeypatch.setattr(tarfile.ExFileObject, "read", counted, raising=False)
    monkeypatch.setattr(
        "jepa_cache.sources.vpt.VptSource.iter_episodes", lambda *_: pytest.fail("recordings were read")
    )
    monkeypatch.setattr("jepa_cache.media.video.open_video", lambda *_: pytest.fail("a video was opened"))
    document = _estimate(fresh).document
    assert document["all"]["episodes"] == 5
    assert len(video) > 1 << 20 and 0 < max(num_read.values()) < 192 << 10


def test_recordings_that_cannot_be_used_are_counted_as_such(fresh):
    write_vpt_tar(fresh.recordings / "bad.tar", {"no": (b"no video", b"{}\n"), "good": make_vpt_pair(20, 5)})
    document = _estimate(fresh).document
    assert (document["all"]["unusable"], document["all"]["episodes"]) == (1, 5)


def test_many_units_are_estimated_from_some_and_that_is_told(fresh, monkeypatch):
    monkeypatch.setattr(estimate, "MAX_HEADERS", 2)
    exact = sum(n // 4 + (n % 4 > 0) for n in (45, 38, 41, 60))
    result = _estimate(fresh)
    assert result.document["estimated"] and result.document["all"]["units"] == 3
    assert result.document["all"]["steps"] == pytest.approx(exact, rel=0.4)
    assert "estimated by bytes from 2 of them" in fresh.run("estimate", fresh.recordings).out


def test_a_folder_of_videos_is_estimated_from_headers_and_tables(fresh, monkeypatch):
    folder = fresh.folder / "pairs"
    folder.mkdir()
    for number, num_frames in enumerate((30, 47)):
        (folder / f"{number}.mp4").write_bytes(make_video(num_frames, number, fps=10))
        rows = [[0.0, float(i)] for i in range(num_frames)]
        (folder / f"{number}.json").write_text(json.dumps({"fps": 10, "states": rows, "actions": rows}))
    monkeypatch.setattr("jepa_cache.media.video.open_video", lambda *_: pytest.fail("a video was opened"))
    result = fresh.run("estimate", "--json", folder, "dataset=mp4_json", "encode.fps=5")
    assert result.document["all"]["steps"] == 15 + 24 and result.document["all"]["episodes"] == 2


def test_what_the_disk_cannot_hold_is_refused(fresh, monkeypatch):
    needed = _estimate(fresh).document["disk"]["needed_bytes"]
    for free, code in ((needed, 0), (needed - 1, 1)):
        monkeypatch.setattr(
            "jepa_cache.cli.estimate.shutil.disk_usage", lambda _, free=free: type("Usage", (), {"free": free})()
        )
        result = _estimate(fresh)
        assert result.code == code and result.document["fits"] == (code == 0)
    text = fresh.run("estimate", fresh.recordings).out
    assert "refused: it does not fit" in text and "encode.dtype" in text


def test_only_what_is_missing_must_fit(checkout):
    whole = _estimate(checkout).document
    assert whole["disk"]["needed_bytes"] == 0
    shutil.rmtree(checkout.tokens(0))
    document = _estimate(checkout).document
    num_steps = checkout.manifest.entries[0].num_steps
    assert document["to_do"]["steps"] == num_steps and document["all"] == whole["all"]
    assert 0 < document["disk"]["needed_bytes"] < document["bytes"]["float16"]["tokens"]


def test_hours_come_from_a_measured_or_given_rate_and_are_empty_else(fresh):
    unknown = _estimate(fresh).document
    assert unknown["rate"] == {"frames_per_s": None, "measured": False, "hours": None}
    given = _estimate(fresh, "--frames-per-s", "10").document
    assert given["rate"]["hours"] == pytest.approx(given["to_do"]["frames"] / 10 / 3600)
    measured = _estimate(fresh, "--measure").document["rate"]
    assert measured["measured"] and measured["frames_per_s"] > 1
    assert measured["hours"] == pytest.approx(given["to_do"]["frames"] / measured["frames_per_s"] / 3600)
    assert not fresh.root.path.exists()


def test_break_even_is_the_build_over_what_one_run_would_encode(fresh):
    document = _estimate(fresh).document
    entry = document["break_even"]
    assert entry["frames"] == document["all"]["frames"]
    assert entry["frames_touched_per_run"] == 600 * 32 * 8  # configs/train/demo.yaml
    assert entry["runs"] == pytest.approx(entry["frames"] / entry["frames_touched_per_run"])
    assert entry["build_flops"] == pytest.approx(entry["frames"] * document["encoder_flops"]["per_frame"])
    assert entry["gain_per_run"] > 1
    for gain, words in ((1.000001, "less than 0.5 % fewer operations"), (1.24, "1.24 times fewer operations")):
        told = estimate._list_lines({**document, "break_even": {**entry, "gain_per_run": gain}})
        assert any(words in line for line in told)
    larger = _estimate(fresh, "predictor=small").document["break_even"]
    assert larger["runs"] == entry["runs"] and larger["gain_per_run"] < entry["gain_per_run"]


def _count_flops(function):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused attention is not counted
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("mode", "num_frames", "sampled", "steps"), [("frame", 2, 1, 1), ("tubelet", 2, 2, 1), ("clip", 8, 8, 4)]
)
def test_an_encoder_input_costs_what_torch_counts(mode, num_frames, sampled, steps):
    preset, encode = CONFIG.encoder, replace(CONFIG.encode, mode=mode, frames_per_clip=8)
    model = VisionTransformer(
        embed_dim=preset.embed_dim, depth=preset.depth, num_heads=preset.num_heads, mlp_dim=preset.mlp_dim
    )
    counted = _count_flops(lambda: model(torch.zeros(1, 3, num_frames, preset.resolution, preset.resolution)))
    assert count_encoder(preset, encode) == (counted, sampled, steps)


@pytest.mark.parametrize(("single_frame", "num_frames"), [("doubled", 2), ("image", 1)])
def test_a_v21_frame_costs_what_torch_counts_on_either_way(single_frame, num_frames):
    preset = replace(CONFIG.encoder, kind="vjepa2_1", depth=12)
    model = VisionTransformer21(
        embed_dim=preset.embed_dim, depth=12, num_heads=preset.num_heads, mlp_dim=preset.mlp_dim
    )
    counted = _count_flops(lambda: model(torch.zeros(1, 3, num_frames, preset.resolution, preset.resolution)))
    assert count_encoder(preset, replace(CONFIG.encode, single_frame=single_frame)) == (counted, 1, 1)


def test_pooling_makes_the_predictor_cheaper_and_leaves_the_encoder():
    shape = {"num_frames": 1000, "num_actions": 7, "num_states": 7}
    whole, pooled = (
        compare_runs(CONFIG.encoder, CONFIG.predictor, CONFIG.train, replace(CONFIG.encode, pool=pool), **shape)
        for pool in (1, 2)
    )
    assert all(whole[name] == pooled[name] for name in ("build_flops", "online_encoder_flops_per_run"))
    assert 2 < whole["predictor_flops_per_run"] / pooled["predictor_flops_per_run"] < 10


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("window_steps", "auto_steps"), [(8, 2), (5, 1), (6, 4)])
def test_a_window_in_training_costs_what_torch_counts(window_steps, auto_steps, checkpointing):
    preset = replace(CONFIG.predictor, predictor_dim=48, depth=2, num_heads=4, activation_checkpointing=checkpointing)
    model = ACPredictor(
        embed_dim=64,
        predictor_dim=48,
        depth=2,
        num_heads=4,
        action_dim=13,
        state_dim=2,
        grid=(4, 4),
        activation_checkpointing=checkpointing,
    )
    tokens, actions = torch.randn(1, window_steps, 16, 64), torch.randn(1, window_steps - 1, 13)
    states = torch.randn(1, window_steps, 2)
    counted = _count_flops(
        lambda: world_model_loss(model, tokens, actions, states, auto_steps=auto_steps).total.backward()
    )
    train = replace(CONFIG.train, window_steps=window_steps, auto_steps=auto_steps)
    estimated = count_predictor(preset, train, num_tokens=16, width=64, num_actions=13, num_states=2)
    # The rollout's states need no gradient either, which is not counted apart.
    assert estimated == pytest.approx(counted, rel=1e-3)


def test_break_even_does_not_depend_on_the_predictor_and_the_gain_does():
    shape = {"encode": CONFIG.encode, "num_frames": 1000, "num_actions": 7, "num_states": 7}
    vitl = load_config(SUITE_SETTINGS, ["encoder=vitl", "predictor=small"])
    small = compare_runs(vitl.encoder, vitl.predictor, vitl.train, **shape)
    large = compare_runs(vitl.encoder, load_config(SUITE_SETTINGS, ["predictor=ac300m"]).predictor, vitl.train, **shape)
    assert small["runs"] == large["runs"] == 1000 / (600 * 32 * 8)
    assert small["gain_per_run"] > large["gain_per_run"] > 1
