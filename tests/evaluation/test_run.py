"""An evaluation as a whole, on a tiny cache.

Claims:
- every figure in metrics.json and horizon.csv equals one recomputed from zarr and the weights with growing contexts;
- a predictor that ignores its actions has gaps of exactly 0 and is told apart from no control; one that copies is not better
  than copying; one that learned from the actions is better than all;
- zero actions keep the slot; weights of other features, actions or another split are refused, and so are too few episodes.
"""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr

from jepa_cache.config.parsing import ConfigError
from jepa_cache.config.schema import MEASUREMENTS, Config
from jepa_cache.evaluation import report
from jepa_cache.evaluation import run as evaluation
from jepa_cache.evaluation.baselines import choose_donors, training_mean
from jepa_cache.evaluation.metrics import bootstrap_mean
from jepa_cache.evaluation.report import describe_metrics, evaluate_run
from jepa_cache.evaluation.subject import check_settings, open_subject
from jepa_cache.predictor.checkpoints import load_predictor, save_predictor
from jepa_cache.training.trainer import train
from tests.caches import Cache, make_cache, make_config


class Trained(NamedTuple):
    cache: Cache
    weights: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    """A cache, and a predictor that learned what actions do."""
    cache = make_cache(tmp_path_factory.mktemp("cache"), encoder_trained=True)
    config = make_config(
        "train.num_steps=250", "train.batch_size=16", "train.lr=0.02", "train.log_every=50", "train.validate_every=0"
    )
    config = replace(config, predictor=replace(config.predictor, predictor_dim=32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JEPA_RUNS_HOME", str(cache.folder / "runs"))
        result = train(config, cache.dataset, cache.scaler, cache.folder / "train/run", base=cache.folder)
    return Trained(cache, result.weights)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take most of the time; test_plots.py draws them."""
    for name in ("draw_horizon", "draw_strip"):
        monkeypatch.setattr(report, name, lambda *_, **__: None)


def changed(trained: Trained, path: Path, change) -> Path:
    """The trained weights, changed, with the same card."""
    predictor, card = load_predictor(trained.weights)
    with torch.no_grad():
        change(predictor)
    save_predictor(predictor, path, card)
    return path


def evaluate(cache: Cache, weights: Path, out: Path, config: Config | None = None) -> dict:
    metrics = evaluate_run(config or cache.config, cache.dataset, weights, out)
    assert json.loads((out / "metrics.json").read_text()) == metrics
    return metrics


# --- the figures, again ---------------------------------------------------------------------------------------------------


def layer_norm(tokens: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-5)


def predict_next(predictor, seen: torch.Tensor, actions: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """[B, N, D] prediction after the given steps, all of them computed anew."""
    num_seen = seen.shape[1]
    return layer_norm(predictor(seen, actions[:, :num_seen], states[:, :num_seen]).tokens[:, -1])


def recompute(cache: Cache, weights: Path) -> tuple[dict[str, dict[str, list[np.ndarray]]], list[str]]:
    """Errors of each held-out window, every prediction from a whole pass over its context; float64 but for the weights."""
    predictor, card = load_predictor(weights)
    predictor.double()
    settings, manifest = cache.config.evaluate, cache.dataset.manifest
    context, stop, num_trained = (
        settings.num_context_steps,
        settings.num_context_steps + settings.horizon,
        card["window_steps"],
    )
    num_steps = max(stop, num_trained)
    scale = card["scaler"]["actions"], card["scaler"]["states"]
    windows, episodes = [], []
    for segment in cache.dataset.segments_of("val", cache.config.split):
        digest = manifest.entries[segment.store].unit_digest
        tokens = zarr.open(cache.root.tokens(manifest.fingerprint, digest))["tokens"][...].astype(np.float64)
        controls = zarr.open(cache.root.actions(manifest.action_fingerprint, digest))
        last = segment.stop - segment.start - num_steps
        for offset in np.linspace(0, last, settings.windows_per_episode).round().astype(int):
            rows = slice(segment.start + offset, segment.start + offset + num_steps)
            raw = controls["actions"][rows][:-1].astype(np.float64)
            zero = raw.copy()
            zero[:, :4] = 0  # mouse and view; the slot stays
            actions, zero = (((a - scale[0]["mean"]) / scale[0]["scale"]) for a in (raw, zero))
            states = (controls["states"][rows].astype(np.float64) - scale[1]["mean"]) / scale[1]["scale"]
            windows.append([torch.from_numpy(x)[None] for x in (tokens[rows], actions, zero, states)])
            episodes.append(segment.episode)
    train_segments = cache.dataset.segments_of("train", cache.config.split)
    mean = training_mean(cache.dataset, train_segments, cache.scaler, num_steps=num_steps, normalize_reps=True).double()
    found: dict[str, dict[str, list[np.ndarray]]] = {}

    def put(name: str, one_step: list[torch.Tensor], rolled: list[torch.Tensor], h: torch.Tensor) -> None:
        for kind, measure in (
            ("l1", lambda a, b: (a - b).abs().mean()),
            ("cosine", lambda a, b: (a * b).sum(-1).div(a.norm(dim=-1) * b.norm(dim=-1)).mean()),
        ):
            teacher = np.mean([float(measure(z, h[:, t + 1])) for t, z in enumerate(one_step)])
            horizon = [float(measure(z, h[:, context + k])) for k, z in enumerate(rolled)]
            found.setdefault(name, {}).setdefault(kind, []).append(np.array([teacher, *horizon]))

    donors = choose_donors(episodes, seed=settings.seed)
    with torch.no_grad():
        for window, (tokens, actions, zero, states) in enumerate(windows):
            h = layer_norm(tokens)
            given = {"model": actions, "shuffled_actions": windows[donors[window]][1], "zero_actions": zero}
            for name, a in given.items():
                one_step = [predict_next(predictor, h[:, : t + 1], a, states) for t in range(num_trained - 1)]
                seen = h[:, :context]
                for _ in range(settings.horizon):
                    seen = torch.cat([seen, predict_next(predictor, seen, a, states)[:, None]], dim=1)
                put(name, one_step, list(seen[:, context:].unbind(1)), h)
            put("copy_last", list(h[:, : num_trained - 1].unbind(1)), [h[:, context - 1]] * settings.horizon, h)
            put("mean", [mean[None]] * (num_trained - 1), [mean[None]] * settings.horizon, h)
    return found, episodes


def test_every_figure_equals_one_recomputed_from_the_files(trained, tmp_path):
    cache, settings = trained.cache, trained.cache.config.evaluate
    found, episodes = recompute(cache, trained.weights)
    metrics = evaluate(cache, trained.weights, tmp_path)

    def per_episode(name: str, kind: str = "l1") -> np.ndarray:
        rows = np.array(found[name][kind])
        return np.array([rows[[e == episode for e in episodes]].mean(axis=0) for episode in sorted(set(episodes))])

    expected = {}
    for kind in ("l1", "cosine"):
        model = per_episode("model", kind)
        expected |= {f"teacher_forcing_{kind}": model[:, 0], f"rollout_{kind}": model[:, 1:].mean(axis=1)}
        expected |= {f"rollout_{kind}_step{k}": model[:, k] for k in range(1, settings.horizon + 1)}
    model, last = per_episode("model"), settings.horizon
    for name in ("copy_last", "mean", "shuffled_actions", "zero_actions"):
        values = per_episode(name)
        expected |= {f"{name}_l1": values[:, 0], f"rollout_{name}_l1": values[:, 1:].mean(axis=1)}
        if name != "mean":
            expected[f"gap_{name}"] = values[:, 0] - model[:, 0]
            expected[f"gap_{name}_step{last}"] = values[:, last] - model[:, last]
    assert set(expected) == set(metrics["val_ci"])
    for name, values in expected.items():
        estimate = bootstrap_mean(values, num_resamples=settings.num_bootstrap, seed=settings.seed)
        assert metrics["val"][name] == pytest.approx(values.mean(), abs=1e-5), name
        assert metrics["val_ci"][name] == pytest.approx(estimate[1:], abs=1e-5), name
    for name in ("copy_last", "shuffled_actions", "zero_actions"):
        ratio = metrics["val"]["teacher_forcing_l1"] / metrics["val"][f"{name}_l1"]
        assert metrics["val"][f"ratio_{name}"] == pytest.approx(ratio)
    with (tmp_path / "horizon.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["horizon"]) for row in rows] == list(range(1, last + 1))
    for row in rows:
        for name in found:
            values = per_episode(name)[:, int(row["horizon"])]
            assert float(row[name]) == pytest.approx(values.mean(), abs=1e-5), (name, row["horizon"])
            assert float(row[f"{name}_low"]) <= float(row[name]) <= float(row[f"{name}_high"])
    assert (metrics["num_episodes"], metrics["num_windows"]) == (3, 15) == (len(set(episodes)), len(episodes))


def test_metrics_hold_what_other_programs_read(trained, tmp_path):
    metrics = evaluate(trained.cache, trained.weights, tmp_path)
    assert metrics["encoder_trained"] is True
    needed = {"teacher_forcing_l1", "rollout_l1", "copy_last_l1", "shuffled_actions_l1", "zero_actions_l1"}
    assert needed <= set(metrics["val"]) and needed <= set(metrics["val_ci"])
    assert all(low <= metrics["val"][name] <= high for name, (low, high) in metrics["val_ci"].items())


def test_the_batch_size_moves_no_figure(trained, tmp_path):
    other = replace(trained.cache.config, evaluate=replace(trained.cache.config.evaluate, batch_size=7))
    one, two = (evaluate(trained.cache, trained.weights, tmp_path, config) for config in (None, other))
    for name, value in one["val"].items():
        assert two["val"][name] == pytest.approx(value, abs=1e-5), name


# --- verdicts -------------------------------------------------------------------------------------------------------------


def test_a_predictor_that_learned_from_its_actions_is_better_than_every_control(trained, tmp_path):
    metrics = evaluate(trained.cache, trained.weights, tmp_path)
    words = describe_metrics(metrics, 4)
    assert words.count("better than") == 6, words
    assert "random weights" not in words


def test_a_predictor_that_ignores_its_actions_is_told_apart_from_no_control(trained, tmp_path):
    deaf = changed(trained, tmp_path / "deaf.safetensors", lambda p: p.action_encoder.weight.zero_())
    metrics = evaluate(trained.cache, deaf, tmp_path)
    for name in ("shuffled_actions", "zero_actions"):
        for key in (f"gap_{name}", f"gap_{name}_step4"):
            assert metrics["val"][key] == 0 and metrics["val_ci"][key] == [0, 0], key
    assert describe_metrics(metrics, 4).count("not told apart from shuffled actions, gap 0.000") == 2


def copy_last(predictor: torch.nn.Module) -> None:
    """Weights that give each token back: blocks that add nothing, and x -> (x, -x, 0) -> x around the norm."""
    width, inner = predictor.embed_dim, predictor.predictor_embed.out_features
    for parameter in predictor.parameters():
        parameter.zero_()
    both = torch.cat([torch.eye(width), -torch.eye(width)])
    predictor.predictor_embed.weight[: 2 * width] = both
    predictor.predictor_norm.weight.fill_(1.0)
    predictor.predictor_proj.weight[:, : 2 * width] = both.T * (2 * width / inner) ** 0.5 / 2


def test_a_predictor_that_copies_is_not_better_than_copying(trained, tmp_path):
    metrics = evaluate(trained.cache, changed(trained, tmp_path / "copy.safetensors", copy_last), tmp_path)
    assert metrics["val"]["copy_last_l1"] > 0.1
    assert metrics["val"]["teacher_forcing_l1"] == pytest.approx(metrics["val"]["copy_last_l1"], abs=1e-4)
    words = describe_metrics(metrics, 4)
    assert words.count("not told apart from copying") == 2 and " better than" not in words, words


def test_a_predictor_that_foresees_worse_is_called_worse(trained, tmp_path):
    wrong = changed(trained, tmp_path / "wrong.safetensors", lambda p: p.predictor_proj.weight.neg_())
    words = describe_metrics(evaluate(trained.cache, wrong, tmp_path), 4)
    assert words.count("one step: worse than") == 3, words


def test_an_untrained_encoder_is_said_in_metrics_and_words(trained, tmp_path):
    metrics = evaluate(trained.cache, trained.weights, tmp_path)
    assert "nothing about the world" in describe_metrics(metrics | {"encoder_trained": False}, 4)
    assert "not comparable" in describe_metrics(metrics | {"comparable": False}, 4)


def test_a_measurement_that_is_asked_for_brings_its_section_and_an_old_table_goes(trained, tmp_path, monkeypatch):
    assert tuple(report.MEASUREMENTS) == MEASUREMENTS  # what the settings may name is what there is

    def measure(subject, out):
        (out / "steps.csv").write_text("horizon\n4\n")
        return {"steps": {"horizon": subject.config.evaluate.horizon}}

    monkeypatch.setitem(report.MEASUREMENTS, "steps", measure)
    config = replace(trained.cache.config, evaluate=replace(trained.cache.config.evaluate, measure=("steps",)))
    assert evaluate(trained.cache, trained.weights, tmp_path, config)["steps"] == {"horizon": 4}
    assert (tmp_path / "steps.csv").is_file()
    assert "steps" not in evaluate(trained.cache, trained.weights, tmp_path)
    assert not (tmp_path / "steps.csv").exists()


def test_an_unknown_measurement_is_refused():
    with pytest.raises(ConfigError, match=r"evaluate\.measure is 'energi'"):
        make_config("evaluate.measure=[energi]")


def test_metrics_name_the_settings_they_were_measured_with(trained, tmp_path):
    settings = evaluate(trained.cache, trained.weights, tmp_path)["settings"]
    assert settings["train_steps"] == 250 and settings["window_steps"] == 5 and settings["horizon"] == 4
    assert settings["encoder"] == trained.cache.config.encoder.name


# --- controls and refusals ------------------------------------------------------------------------------------------------


def test_zero_actions_are_raw_zeros_with_the_slot_kept(trained, monkeypatch):
    cache, seen = trained.cache, []
    monkeypatch.setattr(
        evaluation, "teacher_forcing", lambda p, h, actions, states, **_: seen.append(actions) or h[:, 1:]
    )
    evaluation.measure_windows(open_subject(cache.config, cache.dataset, trained.weights))
    scale = cache.scaler.actions
    for true, zero in zip(seen[0::3], seen[2::3], strict=True):  # model, shuffled, zero of each batch
        raw = zero.numpy() * np.array(scale.scale) + np.array(scale.mean)
        assert np.allclose(raw[..., :4], 0, atol=1e-5)
        assert np.array_equal(zero[..., 4:], true[..., 4:]) and float(zero[..., 4:].sum()) == zero[..., 0].numel()
        assert not np.allclose(true[..., :4], zero[..., :4])


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("tokens_fingerprint", "0" * 32),
        ("action_space", "vpt36"),
        ("description", {"split": {"val_share": 0.3, "seed": 7}}),
    ],
    ids=["features", "actions", "split"],
)
def test_weights_trained_on_something_else_are_refused(trained, tmp_path, name, other):
    predictor, card = load_predictor(trained.weights)
    path = tmp_path / "predictor.safetensors"
    save_predictor(predictor, path, card | {name: other})
    with pytest.raises(ValueError, match=r"was trained with .* train again"):
        evaluate(trained.cache, path, tmp_path)
    assert not (tmp_path / "metrics.json").exists()


def test_features_of_another_recipe_are_refused(trained, tmp_path):
    other = make_cache(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="was trained with tokens recipe"):
        evaluate(other, trained.weights, tmp_path)


def test_missing_weights_name_the_command_that_makes_them(trained, tmp_path):
    with pytest.raises(ValueError, match=r"is missing; run .*train_predictor\.py"):
        evaluate(trained.cache, tmp_path / "nothing.safetensors", tmp_path)


def test_one_held_out_episode_is_too_few(tmp_path, monkeypatch):
    monkeypatch.setenv("JEPA_RUNS_HOME", str(tmp_path / "runs"))
    cache = make_cache(tmp_path, "split.seed=1", "train.num_steps=6")
    result = train(cache.config, cache.dataset, cache.scaler, tmp_path / "train/run", base=tmp_path)
    with pytest.raises(ValueError, match="at least two held-out episodes"):
        evaluate(cache, result.weights, tmp_path)


def test_weights_of_another_training_are_refused(tmp_path):
    # What an interrupted training leaves: the weights of the run before it.
    cache = make_cache(tmp_path)
    result = train(cache.config, cache.dataset, cache.scaler, tmp_path / "out/run", base=tmp_path)
    other = replace(cache.config, train=replace(cache.config.train, lr=0.5))
    with pytest.raises(ValueError, match=r"train\.lr was 0\.\d+, now it is 0\.5"):
        check_settings(other, result.weights)
    check_settings(cache.config, result.weights)
