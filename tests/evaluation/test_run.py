"""An evaluation as a whole, on a tiny cache.

Claims:
- every figure in metrics.json and the tables equals one recomputed from zarr and the weights with growing contexts;
- a predictor that ignores its actions has gaps of exactly 0 and the verdict says so; one that learned from them is better than all;
- weights of other features, actions or another split are refused, and so are weights that give NaN;
- an evaluation that is refused or fails at its end leaves the last one as it was.
"""

import itertools
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr

from jepa_cache.cli.compare import compare_runs
from jepa_cache.config.schema import MEASUREMENTS, Config
from jepa_cache.data.ablations import ABLATIONS, action_ablations
from jepa_cache.data.scaler import scaler_from_json
from jepa_cache.evaluation import run
from jepa_cache.evaluation.context import Measurement, check_settings, choose_windows
from jepa_cache.evaluation.metrics import bootstrap_mean
from jepa_cache.evaluation.run import describe_metrics, evaluate_run
from jepa_cache.evaluation.windows import BASELINES, NoActionsFit, fit_baselines
from jepa_cache.predictor.checkpoints import load_predictor, save_state
from jepa_cache.predictor.rollout import LatentModel
from tests.caches import Cache, no_pictures
from tests.encoded import all_files
from tests.evaluation.evaluations import Trained, evaluation_of, read_rows


@pytest.fixture(autouse=True, scope="module")
def undrawn():
    with no_pictures():
        yield


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


def layer_norm(tokens: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-5)


@torch.no_grad()
def recompute(cache: Cache, weights: Path) -> Again:
    """Errors of each held-out window, every prediction from a whole pass over its context; float64 but for the weights.

    Ablations and baselines are those of test_baselines.py.
    """
    predictor, card = load_predictor(weights)
    predictor.double()
    settings, num_trained, dataset = cache.config.evaluate, card["window_steps"], cache.dataset
    context, horizon = settings.num_context_steps, settings.horizon
    num_steps, scaler = max(context + horizon, num_trained), scaler_from_json(card["scaler"])
    segments = dataset.segments_of("val", cache.config.split)
    chosen = choose_windows(
        segments, num_steps, settings.windows_per_episode
    )  # tests/data/test_windows.py: evenly spread
    starts = [window.start - own.start for window, own in zip(chosen.windows, chosen.segments, strict=True)]
    ablations = action_ablations(dataset, scaler, *chosen, seed=settings.seed)
    training = dataset.segments_of("train", cache.config.split)
    evaluation = evaluation_of(cache, predictor)
    without = NoActionsFit(evaluation, training)
    baselines = fit_baselines(dataset, training, scaler, LatentModel(None, True), no_actions=without)
    linear = baselines.no_actions.predictor.double()
    mean, change = baselines.mean.double(), baselines.change.double()
    errors: dict[tuple[str, str], list[list[float]]] = {}
    measures = {
        "l1": lambda z, h: (z - h).abs().mean(),
        "l2": lambda z, h: ((z - h) ** 2).mean() ** 0.5,
        "cosine": lambda z, h: (z * h).sum(-1).div(z.norm(dim=-1) * h.norm(dim=-1)).mean(),
    }
    for place, window in enumerate(chosen.windows):
        rows = slice(window.start, window.start + num_steps)
        digest = dataset.manifest.entries[window.store].unit_digest
        stored = zarr.open(cache.root.tokens(dataset.manifest.fingerprint, digest))["tokens"][rows]
        h = layer_norm(torch.from_numpy(stored.astype(np.float64)))
        actions, states = dataset.controls(window.store)
        own = torch.from_numpy(scaler.actions.apply(actions[rows][:-1])).double()
        s = torch.from_numpy(scaler.states.apply(states[rows])).double()

        def foresee(seen, given, s=s):
            """By the predictor, from the tokens of the steps so far."""
            if not np.isfinite(np.asarray(given)).all():
                return None
            count, a = len(seen), torch.as_tensor(given).double()
            return layer_norm(predictor(torch.stack(seen)[None], a[None, :count], s[None, :count]).tokens[0, -1])

        def regress(seen, own=own, s=s):
            x = torch.cat([torch.ones(1), own[len(seen) - 1], s[len(seen) - 1]])
            return layer_norm(seen[-1] + torch.einsum("p,pnd->nd", x, change))

        def foresee_alone(seen, s=s):
            """Without actions, from the last step."""
            return layer_norm(
                linear(seen[-1][None, None], torch.empty(1, 1, 0), s[None, len(seen) - 1 :][:, :1]).tokens[0, 0]
            )

        given = {"model": own} | {name: values[place] for name, values in ablations.items()}
        predictions = {name: partial(foresee, given=actions) for name, actions in given.items()} | {
            "copy_last": lambda seen: seen[-1],
            "mean": lambda seen: mean,
            "extrapolation": lambda seen: layer_norm(2 * seen[-1] - seen[-2]) if len(seen) > 1 else None,
            "regression": regress,
            "no_actions": foresee_alone,
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
    return Again({key: np.array(rows) for key, rows in errors.items()}, chosen.episodes, starts)


@pytest.fixture(scope="module")
def again(trained) -> Again:
    return recompute(trained.cache, trained.weights)


@pytest.fixture(scope="module")
def result(trained, undrawn) -> Path:
    """The folder of one evaluation, where `jepa-cache compare` looks for that of its training run."""
    out = trained.cache.folder / "evaluate"
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
        close = 5e-5 if "no_actions" in name else 1e-5  # its components are found in float32, by iteration
        assert metrics["val"][name] == pytest.approx(values.mean(), abs=close), name
        assert metrics["val_ci"][name] == pytest.approx(estimate[1:], abs=close), name
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
    for table, number, first in (("horizon.csv", "horizon", 4), ("positions.csv", "num_seen", 0)):
        rows = read_rows(result / table)
        assert [int(row[number]) for row in rows] == [1, 2, 3, 4]
        for place, row in enumerate(rows):
            for name in ("model", *BASELINES, *ABLATIONS):
                if table == "positions.csv" and name == "extrapolation" and place == 0:
                    assert row[name] == row[f"{name}_low"] == ""
                    continue
                values = again.per_episode(name, slice(first + place, first + place + 1))
                assert float(row[name]) == pytest.approx(values.mean(), abs=5e-5), (table, name, place)
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
    assert settings["tokens_fingerprint"] == cache.dataset.manifest.fingerprint and settings["train"]["lr"] == 0.03
    assert settings["measured"]["evaluate"]["horizon"] == 4 and settings["step"] == 170
    assert settings["run"] in {path.name for path in (cache.folder / "runs").iterdir()}
    short = json.loads((result / "metrics.json").read_text())["settings"]
    expected = {"train_steps": 170, "window_steps": 5, "horizon": 4, "num_context_steps": 2, "step_hz": 5.0, "seed": 0}
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


# --- verdicts -------------------------------------------------------------------------------------------------------------


def test_a_predictor_that_learned_from_its_actions_gets_good_answers(result):
    metrics = json.loads((result / "metrics.json").read_text())
    answers = {name: verdict["answer"] for name, verdict in metrics["verdict"].items()}
    assert answers.pop("limits") == "none"
    assert answers.pop("readout") == "unclear", "the tokens are waves of the yaw, and hold no pitch"
    assert "nothing to read" in metrics["verdict"]["readout"]["words"]
    assert set(answers.values()) == {"yes"}, metrics["verdict"]
    words = describe_metrics(metrics, 4)
    for verdict in metrics["verdict"].values():
        assert verdict["words"] in words
    gain, (low, high) = (metrics[part]["gain_shuffled_actions_percent"] for part in ("val", "val_ci"))
    assert f"error of true actions {gain:.1f} % lower [{low:.1f}, {high:.1f}] than that of another episode's" in words
    assert "for 4 open-loop steps (all that were measured; 0.8 s)" in words


def test_a_predictor_that_ignores_its_actions_is_told_so_whatever_the_batch(trained, result, tmp_path):
    deaf = changed(trained, tmp_path / "deaf.safetensors", lambda p: p.action_encoder.weight.zero_())
    settings = replace(trained.cache.config.evaluate, batch_size=7)
    asked = replace(trained.cache.config, evaluate=settings, encode=replace(trained.cache.config.encode, fps=8.0))
    metrics = evaluate(trained.cache, deaf, tmp_path, asked)
    assert metrics["settings"]["step_hz"] == 5.0, "the true rate, not the requested one"
    before = json.loads((result / "metrics.json").read_text())["val"]
    for name in BASELINES:
        for key in (f"{name}_l1", f"rollout_{name}_l1"):
            assert metrics["val"][key] == pytest.approx(before[key], abs=1e-5), key
    for name in ABLATIONS:
        for where in ("", "_step4"):
            key = f"gap_{name}{where}"
            assert metrics["val"][key] == pytest.approx(0, abs=1e-7), key
            assert metrics["p_value"][key] == 1 or name in ("next_actions", "previous_actions"), key
    for question in ("actions", "actions_rollout", "timing"):
        assert metrics["verdict"][question]["answer"] == "no", metrics["verdict"]
    assert "uses its actions: no, error of true actions 0.0 % lower" in describe_metrics(metrics, 4)


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


def test_weights_of_another_training_are_refused(trained):
    # What an interrupted training leaves: the weights of the run before it.
    config = trained.cache.config
    with pytest.raises(ValueError, match=r"train\.lr was 0\.03, now it is 0\.003"):
        check_settings(config, trained.weights)
    with pytest.raises(ValueError, match=r"is missing; run .*train_predictor\.py"):
        check_settings(config, trained.weights.with_name("nothing.safetensors"))
