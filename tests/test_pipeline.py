"""Claims: the commands of the README work as typed, in any DVC workspace, and only `encode` ever runs the encoder.

The true stage scripts run as processes in a checkout of their own with a smaller sample. One checkout serves all tests
of this file, in their order, as a user's does. A process costs 3 to 9 s of CPU time, most of it imports: as few as the claims need.
"""

import csv
import json

import pytest

from jepa_cache.config.loading import load_config
from jepa_cache.encoding.units import list_units
from jepa_cache.sources import build_source
from tests.encoded import all_files
from tests.training.runs import read_csv
from tests.workspace import Workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    checkout = Workspace(tmp_path_factory.mktemp("pipeline"))
    checkout.first_output = checkout.run("dvc", "repro")
    checkout.run("git", "add", "-A")
    checkout.run("git", "commit", "-qm", "results")
    return checkout


def test_dvc_repro_goes_from_nothing_to_figures_and_pictures_and_dvc_shows_them(workspace):
    metrics = json.loads((workspace.root / "outputs/evaluate/metrics.json").read_text())
    assert metrics["encoder_trained"] is False and "random weights" in workspace.first_output
    for name in ("teacher_forcing_l1", "rollout_l1", "copy_last_l1", "shuffled_actions_l1", "zero_actions_l1"):
        low, high = metrics["val_ci"][name]
        assert low <= metrics["val"][name] <= high
    pictures = workspace.root / "outputs/evaluate/pictures"
    assert all((pictures / name).read_bytes()[:4] == b"\x89PNG" for name in ("horizon.png", "film1_1_tokens.png"))
    for stage in ("fit_scaler", "train_predictor", "evaluate"):
        assert f"next: python stages/{stage}.py" in workspace.first_output
    shown = json.loads(workspace.run("dvc", "metrics", "show", "--json"))[""]["data"]
    figures = shown["outputs/evaluate/summary.json"]["data"]
    assert figures["val"] == {name: metrics["val"][name] for name in figures["val"]} and "rollout_l1" in figures["val"]
    assert figures["verdict"]["actions"] == metrics["verdict"]["actions"]["answer"]
    assert "outputs/evaluate/metrics.json" not in shown, "hundreds of figures hide those that decide"
    workspace.run("dvc", "plots", "show")
    page = (workspace.root / "dvc_plots/index.html").read_text()
    assert "training loss" in page and "horizon.png" in page


def test_a_second_repro_does_nothing_but_the_check(workspace):
    weights = workspace.root / "outputs/train/run/predictor.safetensors"
    before, stores = weights.stat().st_mtime_ns, workspace.stores()
    output = workspace.run("dvc", "repro")
    assert "nothing to encode" in output
    for stage in ("sample", "fit_scaler", "train", "evaluate"):
        assert f"Stage '{stage}' didn't change, skipping" in output
    assert (weights.stat().st_mtime_ns, workspace.stores()) == (before, stores)


def test_an_evaluation_or_training_that_dvc_runs_in_vain_leaves_the_last_results(workspace):
    kept = [workspace.root / "outputs" / name for name in ("evaluate", "train/run")]
    before = [all_files(folder) for folder in kept]
    workspace.edit("params.yaml", "windows_per_episode: 4", "windows_per_episode: 0")
    workspace.edit("params.yaml", "  weight_decay: null", "  weight_decay: -1.0")
    output = workspace.run("dvc", "repro", "--single-item", "--keep-going", "evaluate", "train", fails=True)
    assert output.count("train.weight_decay must be at least 0") == 2 and "Traceback" not in output
    assert "failed to reproduce stages: 'evaluate' and 'train'" in output
    assert [all_files(folder) for folder in kept] == before
    workspace.run("git", "checkout", "-q", "--", ".")


def test_a_queued_grid_of_all_of_stage_two_trains_anew_without_the_encoder_in_copies_of_the_checkout(workspace):
    stores = workspace.stores()
    # In temporary copies of the checkout, with what it holds when they are queued: this line too.
    workspace.edit("stages/train_predictor.py", "trained {result.num_trained}", "TRAINED {result.num_trained}")
    changes = ("train.lr=2e-3,3e-3", "encode.action_space=vpt36", "scaler.states=none", "split.seed=1")
    workspace.run("dvc", "exp", "run", "--queue", "train", *(it for change in changes for it in ("-S", change)))
    workspace.run("git", "checkout", "-q", "--", ".")
    output = workspace.run("dvc", "exp", "run", "--run-all")
    assert output.count("nothing to encode") == output.count("TRAINED 6 of 6") == 2
    assert workspace.stores() == stores
    shown = list(csv.DictReader(workspace.run("dvc", "exp", "show", "--csv").splitlines()))
    assert {"0.002", "0.003"} <= {row["train.lr"] for row in shown}
    runs = (workspace.root.parent / "state/jepa-cache/runs").glob("*/train.csv")
    losses = {tuple(row["total"] for row in read_csv(path.parent)) for path in runs}
    assert len(losses) == 3, "the members of the grid must differ, and from the training before them"


def test_synthetic_and_other_recordings_are_never_mixed(workspace, capsys):
    sample = (workspace.root / "shards/sample/sample-000000.tar").read_bytes()
    (workspace.root / "shards/mine.tar").write_bytes(sample + b"\0" * 512)
    source = build_source("vpt", {})
    with pytest.raises(
        ValueError, match=r"the synthetic sample and 1 other recordings .* choose dataset=vpt for yours"
    ):
        list_units(source, load_config(workspace.root).dataset, ["shards"], workspace.root)
    (unit,) = list_units(source, load_config(workspace.root, ["dataset=vpt"]).dataset, ["shards"], workspace.root)
    assert unit.path.name == "mine.tar" and "skipped: 2 synthetic recordings" in capsys.readouterr().out
