"""An evaluation as a whole, on a tiny cache.

Claims:
- every figure in metrics.json and the tables equals one recomputed from zarr and the weights with growing contexts;
- a predictor that ignores its actions has gaps of exactly 0 and the verdict says so; one that copies is no better than copying; one
  that learned from the actions is better than all;
- weights of other features, actions or another split are refused, and so are too few episodes and weights that give NaN;
- an evaluation that is refused or fails at its end leaves the last one as it was.
"""

import itertools
import json
import re
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr

from jepa_cache.cli.compare import compare_runs
from jepa_cache.config.parsing import ConfigError
from jepa_cache.config.schema import MEASUREMENTS, Config
from jepa_cache.data.ablations import ABLATIONS, choose_donors, draw_rows
from jepa_cache.evaluation import run
from jepa_cache.evaluation.context import Measurement, check_settings
from jepa_cache.evaluation.metrics import bootstrap_mean
from jepa_cache.evaluation.run import describe_metrics, evaluate_run
from jepa_cache.evaluation.windows import BASELINES, RIDGE
from jepa_cache.predictor.checkpoints import load_predictor, save_state
from tests.caches import Cache, make_config
from tests.encoded import all_files
from tests.evaluation.evaluations import Trained, read_rows


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take most of the time; test_pictures.py draws them."""
    for name in ("draw_pictures", "write_page"):
        monkeypatch.setattr(run, name, lambda *_, **__: None)


def changed(trained: Trained, path: Path, change) -> Path:
    """The trained weights, changed, with the same card."""
    predictor, card = load_predictor(trained.weights)
    with torch.no_grad():
        change(predictor)
    save_state(predictor.state_dict(), path, card)
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


class Again(NamedTuple):
    """Errors computed anew: (prediction, measure) to [windows, T-1 + K], NaN where it does not exist."""

    errors: dict[tuple[str, str], np.ndarray]
    episodes: list[str]
    starts: list[int]  # row of each window in its episode

    def per_episode(self, name: str, columns: slice, measure: str = "l1", less: str | None = None) -> np.ndarray:
        """Means over steps, windows and nothing else, of the errors or of what they exceed another's by."""
        values = self.errors[name, measure]
        if less is not None:
            values = values - self.errors[less, measure]
        means = [[np.nanmean(row) if np.isfinite(row).any() else np.nan] for row in values[:, columns]]
        episodes = np.array(self.episodes)
        return np.array([np.nanmean(np.array(means)[episodes == name]) for name in sorted(set(self.episodes))])


def read_arrays(cache: Cache, card: dict, segment) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Layer-normed tokens, raw actions and scaled states of a segment, read by zarr-python."""
    manifest, rows = cache.dataset.manifest, slice(segment.start, segment.stop)
    digest = manifest.entries[segment.store].unit_digest
    tokens = zarr.open(cache.root.tokens(manifest.fingerprint, digest))["tokens"][rows].astype(np.float64)
    controls = zarr.open(cache.root.actions(manifest.action_fingerprint, digest))
    scale = card["scaler"]["states"]
    states = (controls["states"][rows].astype(np.float64) - scale["mean"]) / scale["scale"]
    return layer_norm(torch.from_numpy(tokens)), controls["actions"][rows].astype(np.float64), states


def scaled(card: dict, actions: np.ndarray) -> np.ndarray:
    scale = card["scaler"]["actions"]
    return (actions - scale["mean"]) / scale["scale"]


def spread(segment, num_steps: int, count: int) -> np.ndarray:
    return np.linspace(0, segment.stop - segment.start - num_steps, count).round().astype(int)


def fit_again(cache: Cache, card: dict) -> tuple[torch.Tensor, np.ndarray]:
    """Mean [N, D] of all training steps, and regression weights by least squares with the penalty as rows of data."""
    tokens, inputs, changes = [], [], []
    for segment in cache.dataset.segments_of("train", cache.config.split):
        h, actions, states = read_arrays(cache, card, segment)
        tokens.append(h.numpy())
        inputs.append(np.hstack([scaled(card, actions[:-1]), states[:-1], np.ones((len(h) - 1, 1))]))
        changes.append(np.diff(h.numpy(), axis=0).reshape(len(h) - 1, -1))
    x, y = np.concatenate(inputs), np.concatenate(changes)
    penalty = np.sqrt(RIDGE * len(x)) * np.eye(x.shape[1])
    penalty[-1] *= 1e-3
    padded = np.vstack([x, penalty]), np.vstack([y, np.zeros((x.shape[1], y.shape[1]))])
    return torch.from_numpy(np.concatenate(tokens).mean(axis=0)), np.linalg.lstsq(*padded, rcond=None)[0]


@torch.no_grad()
def recompute(cache: Cache, weights: Path) -> Again:
    """Errors of each held-out window, every prediction from a whole pass over its context; float64 but for the weights."""
    predictor, card = load_predictor(weights)
    predictor.double()
    settings, num_trained = cache.config.evaluate, card["window_steps"]
    context, horizon = settings.num_context_steps, settings.horizon
    num_steps = max(context + horizon, num_trained)
    windows, episodes, starts = [], [], []
    for segment in cache.dataset.segments_of("val", cache.config.split):
        h, actions, states = read_arrays(cache, card, segment)
        for start in spread(segment, num_steps, settings.windows_per_episode):
            rows = [actions[start + shift : start + shift + num_steps - 1] for shift in (0, 1, -1)]
            inside = start > 0 and start + num_steps < segment.stop - segment.start
            own = slice(start, start + num_steps)
            windows.append((h[own], rows, inside, torch.from_numpy(states[own])))
            episodes.append(segment.episode)
            starts.append(int(start))
    mean, change = fit_again(cache, card)
    donors = choose_donors(episodes, seed=settings.seed)
    drawn = draw_rows(episodes, num_steps - 1, seed=settings.seed)
    every_row = np.concatenate([window[1][0] for window in windows])
    errors: dict[tuple[str, str], list[list[float]]] = {}

    measures = {
        "l1": lambda z, h: (z - h).abs().mean(),
        "l2": lambda z, h: ((z - h) ** 2).mean() ** 0.5,
        "cosine": lambda z, h: (z * h).sum(-1).div(z.norm(dim=-1) * h.norm(dim=-1)).mean(),
    }
    for place, (h, (own, after, before), inside, states) in enumerate(windows):
        zero = own.copy()
        zero[:, :4] = 0  # mouse and view; the slot stays
        given = {"model": own, "shuffled_actions": windows[donors[place]][1][0], "zero_actions": zero}
        given |= {"permuted_actions": every_row[drawn[place]]}
        given |= {
            name: rows if inside else None for name, rows in (("next_actions", after), ("previous_actions", before))
        }

        def foresee(seen, raw, states=states):
            """By the predictor, from the tokens of the steps so far."""
            if raw is None:
                return None
            a = torch.from_numpy(scaled(card, raw))[None]
            return predict_next(predictor, torch.stack(seen)[None], a, states[None])[0]

        def regress(seen, own=own, states=states):
            x = np.hstack([scaled(card, own[len(seen) - 1]), states[len(seen) - 1], 1.0])
            return layer_norm(seen[-1] + torch.from_numpy(x @ change).reshape(seen[-1].shape))

        predictions = {name: partial(foresee, raw=raw) for name, raw in given.items()} | {
            "copy_last": lambda seen: seen[-1],
            "mean": lambda seen: mean,
            "extrapolation": lambda seen: layer_norm(2 * seen[-1] - seen[-2]) if len(seen) > 1 else None,
            "regression": regress,
        }
        for name, predict in predictions.items():
            found, rolled = [predict(list(h[: t + 1])) for t in range(num_trained - 1)], list(h[:context])
            for _ in range(horizon):
                rolled.append(predict(rolled))
            true = [*h[1:num_trained], *h[context : context + horizon]]
            pairs = list(zip([*found, *rolled[context:]], true, strict=True))
            for measure, of in measures.items():
                row = [np.nan if z is None else float(of(z, h)) for z, h in pairs]
                errors.setdefault((name, measure), []).append(row)
    return Again({key: np.array(rows) for key, rows in errors.items()}, episodes, starts)


@pytest.fixture(scope="module")
def again(trained) -> Again:
    return recompute(trained.cache, trained.weights)


@pytest.fixture(scope="module")
def result(trained) -> Path:
    """The folder of one evaluation, where `jepa-cache compare` looks for that of its training run."""
    out = trained.cache.folder / "evaluate"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_pictures", "write_page"):
            patch.setattr(run, name, lambda *_, **__: None)
        evaluate(trained.cache, trained.weights, out)
    return out


def sign_flips(gaps: np.ndarray) -> float:
    """Share of all signs whose mean is at least as far from 0."""
    means = np.array(list(itertools.product((-1, 1), repeat=len(gaps)))) @ gaps
    return float((np.abs(means) >= abs(gaps.sum()) - 1e-12).mean())


def test_every_figure_equals_one_recomputed_from_the_files(trained, again, result):
    settings, metrics = trained.cache.config.evaluate, json.loads((result / "metrics.json").read_text())
    first, last = 4, 4 + settings.horizon  # columns: four teacher-forced steps, then the horizon
    one_step, horizon = slice(0, first), slice(first, last)
    expected, gains = {}, {}
    for kind in ("l1", "l2", "cosine"):
        expected[f"teacher_forcing_{kind}"] = again.per_episode("model", one_step, kind)
        expected[f"rollout_{kind}"] = again.per_episode("model", horizon, kind)
        for k in range(settings.horizon):
            expected[f"rollout_{kind}_step{k + 1}"] = again.per_episode("model", slice(first + k, first + k + 1), kind)
    for name in (*BASELINES, *ABLATIONS):
        expected |= {
            f"{name}_l1": again.per_episode(name, one_step),
            f"rollout_{name}_l1": again.per_episode(name, horizon),
        }
        ends = {"": one_step, f"_step{settings.horizon}": slice(last - 1, last)}
        if name in ("copy_last", "mean", "shuffled_actions"):
            ends |= {f"_step{k}": slice(first + k - 1, first + k) for k in range(1, settings.horizon)}
        for where, columns in ends.items():
            expected[f"gap_{name}{where}"] = again.per_episode(name, columns, less="model")
            gains[f"gain_{name}{where}_percent"] = expected[f"gap_{name}{where}"], again.per_episode(name, columns)
            p = metrics["p_value"][f"gap_{name}{where}"]
            assert p == pytest.approx(sign_flips(expected[f"gap_{name}{where}"]), abs=1e-9), (name, where)
    assert set(expected) | set(gains) == set(metrics["val_ci"])
    for name, values in expected.items():
        estimate = bootstrap_mean(values, num_resamples=settings.num_bootstrap, seed=settings.seed)
        assert metrics["val"][name] == pytest.approx(values.mean(), abs=1e-5), name
        assert metrics["val_ci"][name] == pytest.approx(estimate[1:], abs=1e-5), name
    for name, (gaps, errors) in gains.items():
        assert metrics["val"][name] == pytest.approx(100 * gaps.mean() / errors.mean(), abs=1e-2), name
        low, high = metrics["val_ci"][name]
        assert low <= metrics["val"][name] <= high
    for name in ("copy_last", "shuffled_actions", "zero_actions"):
        ratio = metrics["val"]["teacher_forcing_l1"] / metrics["val"][f"{name}_l1"]
        assert metrics["val"][f"ratio_{name}"] == pytest.approx(ratio)
    assert (metrics["num_episodes"], metrics["num_windows"]) == (len(set(again.episodes)), len(again.episodes))
    assert metrics["num_episodes"] >= 6
    training = trained.cache.dataset.segments_of("train", trained.cache.config.split)
    assert metrics["num_fitted_steps"] == sum(segment.stop - segment.start for segment in training)
    assert f"fitted on all {metrics['num_fitted_steps']} steps" in describe_metrics(metrics, 4)


def test_every_table_equals_one_recomputed_from_the_files(again, result):
    tables = {"horizon.csv": ("l1", "horizon", 4), "horizon_l2.csv": ("l2", "horizon", 4)}
    tables |= {"horizon_cosine.csv": ("cosine", "horizon", 4), "positions.csv": ("l1", "num_seen", 0)}
    for table, (measure, number, first) in tables.items():
        rows = read_rows(result / table)
        assert [int(row[number]) for row in rows] == [1, 2, 3, 4]
        for place, row in enumerate(rows):
            for name in ("model", *BASELINES, *ABLATIONS):
                if table == "positions.csv" and name == "extrapolation" and place == 0:
                    assert row[name] == row[f"{name}_low"] == ""
                    continue
                values = again.per_episode(name, slice(first + place, first + place + 1), measure)
                assert float(row[name]) == pytest.approx(values.mean(), abs=1e-5), (table, name, place)
                assert float(row[f"{name}_low"]) <= float(row[name]) <= float(row[f"{name}_high"])


def test_the_worst_windows_are_named_with_their_time_in_the_recording_and_slices_are_of_the_same_windows(again, result):
    errors = again.errors["model", "l1"][:, :4].mean(axis=1)
    rows = read_rows(result / "worst.csv")
    worst = np.argsort(-errors)[:10]
    assert [row["episode"] for row in rows] == [again.episodes[place] for place in worst]
    assert [int(row["first_step"]) for row in rows] == [again.starts[place] for place in worst]
    for row, place in zip(rows, worst, strict=True):
        assert float(row["start_s"]) == pytest.approx(again.starts[place] / 5.0)  # 5 steps a second
        assert float(row["l1"]) == pytest.approx(errors[place], abs=1e-5)
        assert float(row["copy_last_l1"]) == pytest.approx(again.errors["copy_last", "l1"][place, :4].mean(), abs=1e-5)
    counts = {}
    for row in read_rows(result / "slices.csv"):  # test_slices.py says what a row holds
        counts[row["slice"]] = counts.get(row["slice"], 0) + int(row["num_windows"])
    assert counts == dict.fromkeys(("episode", "token_motion", "action_size"), len(errors))


def test_the_rows_of_episodes_average_to_the_metrics(trained, result):
    rows, metrics = read_rows(result / "episodes.csv"), json.loads((result / "metrics.json").read_text())
    held_out = {segment.episode for segment in trained.cache.dataset.segments_of("val", trained.cache.config.split)}
    assert [row["episode"] for row in rows] == sorted(held_out) and len(rows) == metrics["num_episodes"]
    assert sum(int(row["num_windows"]) for row in rows) == metrics["num_windows"]
    names = [name for name in rows[0] if name.endswith("_l1")]
    assert {"teacher_forcing_l1", "rollout_l1", "copy_last_l1", "rollout_zero_actions_l1"} <= set(names)
    for name in names:
        mean = np.mean([float(row[name]) for row in rows if row[name]])
        assert mean == pytest.approx(metrics["val"][name], abs=1e-6), name  # float32 means


def test_the_settings_say_which_run_was_measured_on_what_and_compare_finds_it(trained, result):
    cache, settings = trained.cache, json.loads((result / "settings.json").read_text())
    assert settings["tokens_fingerprint"] == cache.dataset.manifest.fingerprint and settings["train"]["lr"] == 0.02
    assert settings["measured"]["evaluate"]["horizon"] == 4 and settings["step"] == 250
    assert settings["run"] in {path.name for path in (cache.folder / "runs").iterdir()}
    short = json.loads((result / "metrics.json").read_text())["settings"]
    expected = {"train_steps": 250, "window_steps": 5, "horizon": 4, "num_context_steps": 2, "step_hz": 5.0, "seed": 0}
    assert short.items() >= (expected | {"encoder": "tiny", "normalize_reps": True}).items()
    outcome = compare_runs([str(result), str(cache.folder / "train/run")])
    (pair,) = outcome.document["groups"][0]["paired"]
    assert outcome.fine and pair["rollout_l1"]["words"] == "no difference shown"
    (result / "settings.json").write_text(json.dumps(settings | {"run": "another"}))
    try:
        with pytest.raises(ValueError, match="of another training run"):
            compare_runs([str(cache.folder / "train/run")])
    finally:
        (result / "settings.json").write_text(json.dumps(settings))


def test_the_batch_size_moves_no_figure(trained, result, tmp_path):
    other = replace(trained.cache.config, evaluate=replace(trained.cache.config.evaluate, batch_size=7))
    two = evaluate(trained.cache, trained.weights, tmp_path, other)
    for name, value in json.loads((result / "metrics.json").read_text())["val"].items():
        assert two["val"][name] == pytest.approx(value, abs=1e-5), name


# --- verdicts -------------------------------------------------------------------------------------------------------------


def test_a_predictor_that_learned_from_its_actions_gets_good_answers(result):
    metrics = json.loads((result / "metrics.json").read_text())
    answers = {name: verdict["answer"] for name, verdict in metrics["verdict"].items()}
    assert answers.pop("limits") == "none"
    assert set(answers.values()) == {"yes"}, metrics["verdict"]
    words = describe_metrics(metrics, 4)
    for verdict in metrics["verdict"].values():
        assert verdict["words"] in words
    gain, (low, high) = (metrics[part]["gain_shuffled_actions_percent"] for part in ("val", "val_ci"))
    assert f"error of true actions {gain:.1f} % lower [{low:.1f}, {high:.1f}] than that of another episode's" in words
    assert "for 4 open-loop steps (all that were measured; 0.8 s)" in words


def test_a_predictor_that_ignores_its_actions_is_told_so(trained, tmp_path):
    deaf = changed(trained, tmp_path / "deaf.safetensors", lambda p: p.action_encoder.weight.zero_())
    metrics = evaluate(trained.cache, deaf, tmp_path)
    for name in ABLATIONS:
        for where in ("", "_step4"):
            key = f"gap_{name}{where}"
            assert metrics["val"][key] == pytest.approx(0, abs=1e-7), key
            assert metrics["p_value"][key] == 1 or name in ("next_actions", "previous_actions"), key
    for question in ("actions", "actions_rollout", "timing"):
        assert metrics["verdict"][question]["answer"] == "no", metrics["verdict"]
    assert "uses its actions: no, error of true actions 0.0 % lower" in describe_metrics(metrics, 4)


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
    assert all(low <= metrics["val"][name] <= high for name, (low, high) in metrics["val_ci"].items())
    assert metrics["val"]["teacher_forcing_l1"] == pytest.approx(metrics["val"]["copy_last_l1"], abs=1e-4)
    answers = {name: verdict["answer"] for name, verdict in metrics["verdict"].items()}
    assert {answers[name] for name in ("actions", "copying", "baselines", "horizon")} == {"no"}, metrics["verdict"]


def test_a_predictor_that_gives_nan_is_no_measurement(trained, tmp_path):
    broken = changed(trained, tmp_path / "nan.safetensors", lambda p: p.predictor_proj.weight.fill_(float("nan")))
    with pytest.raises(ValueError, match="NaN or infinity"):
        evaluate(trained.cache, broken, tmp_path)
    assert not (tmp_path / "metrics.json").exists()


def test_a_requested_measurement_is_checked_first_brings_its_section_and_an_old_table_goes(
    trained, tmp_path, monkeypatch
):
    assert tuple(run.MEASUREMENTS) == MEASUREMENTS  # what the settings may name is what there is

    def measure(evaluation, out):
        (out / "steps.csv").write_text("horizon\n4\n")
        return {"steps": {"horizon": evaluation.config.evaluate.horizon}}

    known = Measurement("steps", "steps", measure, "Steps", "None.", ())
    monkeypatch.setitem(run.MEASUREMENTS, "steps", known)
    config = replace(trained.cache.config, evaluate=replace(trained.cache.config.evaluate, measure=("steps",)))
    assert evaluate(trained.cache, trained.weights, tmp_path, config)["steps"] == {"horizon": 4}
    assert (tmp_path / "steps.csv").is_file()
    assert "steps" not in evaluate(trained.cache, trained.weights, tmp_path)
    assert not (tmp_path / "steps.csv").exists()
    monkeypatch.setitem(run.MEASUREMENTS, "steps", known._replace(check=lambda _: 1 / 0))
    monkeypatch.setattr(run, "measure_windows", lambda _: pytest.fail("measured before it was checked"))
    with pytest.raises(ZeroDivisionError):
        evaluate(trained.cache, trained.weights, tmp_path, config)


@pytest.mark.parametrize("late", [False, True], ids=["refused", "fails at its end"])
def test_an_evaluation_that_gives_nothing_leaves_the_last_one_as_it_was(trained, result, monkeypatch, late):
    before = all_files(result)
    config = trained.cache.config
    if late:
        monkeypatch.setattr(run, "worst_table", lambda *_: 1 / 0)
    else:
        config = replace(config, evaluate=replace(config.evaluate, horizon=200))
    with pytest.raises(ZeroDivisionError if late else ValueError):
        evaluate(trained.cache, trained.weights, result, config)
    assert len(before) > 5 and all_files(result) == before


def test_what_does_not_exist_is_left_out_and_said(trained, tmp_path):
    # One step of context has no line through it, and a window as long as its segment has no neighbours.
    settings = replace(trained.cache.config.evaluate, num_context_steps=1, horizon=29)
    metrics = evaluate(trained.cache, trained.weights, tmp_path, replace(trained.cache.config, evaluate=settings))
    assert "NaN" not in (tmp_path / "metrics.json").read_text()
    assert "extrapolation_l1" in metrics["val"] and "rollout_extrapolation_l1" not in metrics["val"]
    assert not any("next_actions" in name or "previous_actions" in name for name in metrics["val"])
    assert not {"extrapolation", "next_actions"} & set(read_rows(tmp_path / "horizon.csv")[0])
    assert metrics["verdict"]["timing"]["answer"] == "unclear"
    assert "next_actions: one step not measured, open-loop step 29 not measured" in describe_metrics(metrics, 29)


# --- controls and refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("tokens_fingerprint", "0" * 32),
        ("action_space", "vpt36"),
        ("description", {"split": {"val_share": 0.4, "seed": 7}}),
    ],
    ids=["features", "actions", "split"],
)
def test_weights_trained_on_something_else_are_refused(trained, tmp_path, name, other):
    predictor, card = load_predictor(trained.weights)
    path = tmp_path / "predictor.safetensors"
    save_state(predictor.state_dict(), path, card | {name: other})
    with pytest.raises(ValueError, match=r"was trained with .* train again"):
        evaluate(trained.cache, path, tmp_path)
    assert not (tmp_path / "metrics.json").exists()


WRONG = """
evaluate.measure=[energi] evaluate.probes=[inverse_dynamic] evaluate.num_bootstrap=99 evaluate.num_bootstrap=100000000000
evaluate.energy_samples=55 evaluate.energy_axes=[dx,dx] evaluate.noise_windows=0 plan.settings=notebok plan.num_samples=1
plan.horizons=[] plan.horizons=[1,1] plan.max_rotation_rad=-1.0 plan.max_step_m=0.0
"""


@pytest.mark.parametrize("override", WRONG.split())
def test_settings_that_cannot_work_are_refused(override):
    with pytest.raises(ConfigError, match=re.escape(override.split("=")[0])):
        make_config(override)


def test_one_held_out_episode_is_too_few(trained, tmp_path):
    dataset, path = trained.cache.dataset, tmp_path / "predictor.safetensors"
    splits = (replace(trained.cache.config.split, val_share=0.06, seed=seed) for seed in range(50))
    split = next(one for one in splits if len({segment.episode for segment in dataset.segments_of("val", one)}) == 1)
    predictor, card = load_predictor(trained.weights)
    save_state(predictor.state_dict(), path, card | {"description": card["description"] | {"split": asdict(split)}})
    with pytest.raises(ValueError, match="at least two held-out episodes"):
        evaluate(trained.cache, path, tmp_path, replace(trained.cache.config, split=split))


def test_weights_of_another_training_are_refused(trained):
    # What an interrupted training leaves: the weights of the run before it.
    config = trained.cache.config
    with pytest.raises(ValueError, match=r"train\.lr was 0\.02, now it is 0\.003"):
        check_settings(config, trained.weights)
    with pytest.raises(ValueError, match=r"is missing; run .*train_predictor\.py"):
        check_settings(config, trained.weights.with_name("nothing.safetensors"))
