"""What the stages of stage two say of too few recordings.

Claims:
- a split that evaluate would refuse is said by fit_scaler and refused by train before it trains, with the counts and the way out;
- training on every episode is still possible, and says that nothing can be evaluated;
- `outputs` keeps two experiments apart, stage by stage, and a stage that DVC runs leaves its results where dvc.yaml has them.
"""

import re
import runpy
import shutil

import pytest

from jepa_cache.config.loading import REPOSITORY_ROOT
from tests.caches import OVERRIDES, make_cache, no_pictures
from tests.workspace import copy_settings

pytestmark = pytest.mark.usefixtures("runs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return copy_settings(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def checkout(folder):
    shutil.copytree(REPOSITORY_ROOT / "stages", folder / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    cache = make_cache(folder)

    def run(name, *changes):
        stage = runpy.run_path(str(folder / f"stages/{name}.py"))
        return stage["main"]([*OVERRIDES, f"cache.root={cache.root.path}", *changes])

    return run


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        (
            ["split.seed=1"],
            r"7 training, 1 held out; evaluate needs 2 held out and 1 for training with 6 steps in a row",
        ),
        (
            ["evaluate.horizon=40"],
            r"5 training \(0 with 42 steps in a row\), 3 held out \(0 with 42 steps in a row\); .*lower",
        ),
        (
            ["split.val_share=0.9", "split.seed=1", "evaluate.measure=[probes]"],
            r"1 training, 7 held out; .*and 2 for training",
        ),
    ],
)
def test_a_split_that_evaluate_refuses_is_said_and_refused_before_training(checkout, capsys, changes, counts):
    checkout("fit_scaler", *changes)
    assert re.search(f"episodes: {counts}", capsys.readouterr().out)
    with pytest.raises(ValueError, match=f"episodes: {counts}"):
        checkout("train_predictor", *changes)


def test_training_on_every_episode_is_said_to_leave_nothing_to_evaluate(checkout, capsys):
    checkout("fit_scaler", "split.val_share=0")
    assert "8 training, 0 held out; evaluate needs 2 held out" in capsys.readouterr().out
    checkout("train_predictor", "split.val_share=0", "train.num_steps=6")
    assert "no episode is held out, so nothing can be evaluated" in capsys.readouterr().out


def test_hints_repeat_settings(checkout, capsys):
    checkout("fit_scaler", "split.seed=1")
    assert re.search(r"next: python stages/train_predictor\.py .*split\.seed=1\n$", capsys.readouterr().out)


def list_files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_outputs_keep_two_experiments_apart_stage_by_stage(checkout, folder, tmp_path, capsys):
    first, other = folder / "outputs", tmp_path / "other"
    checkout("fit_scaler")
    with pytest.raises(ValueError, match=rf"{other}/encode/manifest\.json is missing"):
        checkout("fit_scaler", f"outputs={other}")
    shutil.copytree(first / "encode", other / "encode")
    before = list_files(first)
    few = ["plan.num_samples=10", "plan.num_rounds=1", "plan.horizons=[1]", "plan.starts_per_episode=1"]
    with no_pictures():
        for stage in ("fit_scaler", "train_predictor", "evaluate", "plan", "act"):
            checkout(stage, f"outputs={other}", "split.exact_below=0", *few)
    said, left = capsys.readouterr().out, list_files(other)
    assert list_files(first) == before, "the first experiment is as it was"
    for result in (
        "scaler/scaler.json",
        "train/run/predictor.safetensors",
        "evaluate/metrics.json",
        "plan/metrics.json",
    ):
        assert result in left and f"wrote {other}/{result.split('/')[0]}/" in said
    assert "act/metrics.json" in left


def test_under_dvc_results_lie_where_dvc_yaml_declares_them(checkout, folder, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "fit_scaler")
    checkout("fit_scaler")  # a project without a pipeline of ours
    (folder / "dvc.yaml").write_text("stages: {fit_scaler: {outs: [mine/scaler/scaler.json, my_outputs/x]}}")
    with pytest.raises(ValueError, match=r"params\.yaml: outputs is 'outputs', but DVC runs .*set outputs to"):
        checkout("fit_scaler")
    shutil.copytree(folder / "outputs", folder / "mine")
    checkout("fit_scaler", "outputs=mine/")
    shutil.copyfile(REPOSITORY_ROOT / "dvc.yaml", folder / "dvc.yaml")
    checkout("fit_scaler")
    for wrong in (".", "..", "dvc.yaml"):
        with pytest.raises(ValueError, match="name a folder of its own"):
            checkout("fit_scaler", f"outputs={wrong}")
    with pytest.raises(ValueError, match=r"command line: outputs is 'mine', but DVC runs"):
        checkout("fit_scaler", "outputs=mine")
