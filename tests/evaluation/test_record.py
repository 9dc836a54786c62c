"""What an evaluation leaves for comparisons.

Claims: episodes.csv averages to metrics.json, column by column; settings.json names the run, its settings and the windows;
`jepa-cache compare` reads both, and finds the evaluation of a training run, but not that of another one.
"""

import csv
import json
import shutil

import numpy as np
import pytest

from jepa_cache.cli.compare import compare_runs
from jepa_cache.evaluation import run
from jepa_cache.evaluation.run import evaluate_run
from jepa_cache.training.trainer import train
from tests.caches import make_cache


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A tiny run, evaluated: its cache, weights, folder of results and metrics."""
    cache = make_cache(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JEPA_RUNS_HOME", str(cache.folder / "runs"))
        for name in ("draw_pictures", "write_page"):
            patch.setattr(run, name, lambda *_, **__: None)
        weights = train(
            cache.config, cache.dataset, cache.scaler, cache.folder / "train/run", base=cache.folder
        ).weights
        metrics = evaluate_run(cache.config, cache.dataset, weights, cache.folder / "evaluate")
    return cache, cache.folder / "evaluate", metrics


def test_the_rows_of_episodes_average_to_the_metrics(evaluated):
    cache, folder, metrics = evaluated
    with (folder / "episodes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    held_out = {segment.episode for segment in cache.dataset.segments_of("val", cache.config.split)}
    assert [row["episode"] for row in rows] == sorted(held_out) and len(rows) == metrics["num_episodes"]
    assert sum(int(row["num_windows"]) for row in rows) == metrics["num_windows"]
    names = [name for name in rows[0] if name.endswith("_l1")]
    assert {"teacher_forcing_l1", "rollout_l1", "copy_last_l1", "rollout_zero_actions_l1"} <= set(names)
    for name in names:
        assert np.mean([float(row[name]) for row in rows]) == pytest.approx(metrics["val"][name], abs=1e-6), (
            name
        )  # float32 means
    assert len({row["rollout_l1"] for row in rows}) == len(rows)


def test_the_settings_say_which_run_was_measured_on_what(evaluated):
    cache, folder, _ = evaluated
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["tokens_fingerprint"] == cache.dataset.manifest.fingerprint
    assert settings["train"]["lr"] == cache.config.train.lr and settings["step"] == cache.config.train.num_steps
    assert settings["measured"]["evaluate"]["horizon"] == cache.config.evaluate.horizon
    assert settings["run"] in {path.name for path in (cache.folder / "runs").iterdir()}


def test_an_evaluation_is_found_from_its_training_run_and_differs_in_nothing_from_itself(evaluated):
    cache, folder, _ = evaluated
    outcome = compare_runs([str(folder), str(cache.folder / "train/run")])
    (group,) = outcome.document["groups"]
    (pair,) = group["paired"]
    assert (
        outcome.exit_code == 0 and pair["rollout_l1"]["mean"] == 0 and pair["rollout_l1"]["words"] == "not told apart"
    )
    assert group["runs"][0]["settings"] == {} and any("random weights" in line for line in outcome.lines)


def test_the_evaluation_of_another_training_run_is_refused(evaluated, tmp_path):
    cache, folder, _ = evaluated
    shutil.copytree(folder, tmp_path / "evaluate")
    shutil.copytree(cache.folder / "train", tmp_path / "train")
    settings = json.loads((tmp_path / "evaluate/settings.json").read_text())
    (tmp_path / "evaluate/settings.json").write_text(json.dumps(settings | {"run": "another"}))
    with pytest.raises(ValueError, match="of another training run"):
        compare_runs([str(tmp_path / "train/run")])
