"""Claims of cli/view.py: an episode goes into a file with frames, tokens, actions and plans; without screen or library a message says what to do.

Plans are those of the episode and of the predictor that is shown; others' are named and left out.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from jepa_cache.cli.view import _log_plans, read_plans, view
from jepa_cache.evaluation.metrics import write_json, write_table
from jepa_cache.predictor.checkpoints import save_state

PLAN = {"episode": "=x", "camera": "", "phase": "0", "first_step": 5, "horizon": 2}
FOUND = {
    "camera_deg_plan": 3.0,
    "camera_deg_other_goal": 9.0,
    "planned_dyaw": 1.0,
    "energy_plan": 0.5,
    "energy_recorded": 0.25,
}


def show(saved) -> str:
    """What `rerun rrd print` says of a file."""
    command = [sys.executable, "-m", "rerun", "rrd", "print", str(saved)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # wherever this process has rerun from
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout


def write_plans(folder, run: str) -> None:
    folder.mkdir(exist_ok=True)
    write_json({"run": run}, folder / "metrics.json")
    write_table([PLAN | FOUND, PLAN | FOUND | {"episode": "another"}], folder / "plans.csv")


def test_plans_are_those_of_the_episode_and_of_this_predictor(tmp_path, capsys):
    weights, folder = tmp_path / "predictor.safetensors", tmp_path / "plan"
    assert read_plans(folder, weights, "=x") == []
    save_state({"weight": torch.zeros(1)}, weights, {"run": "mine"})
    write_plans(folder, "mine")
    (row,) = read_plans(folder, weights, "=x")
    assert row["energy_plan"] == "0.5" and capsys.readouterr().out == ""
    write_plans(folder, "another's")
    assert read_plans(folder, weights, "=x") == [] and "are not of this predictor" in capsys.readouterr().out


def test_a_plan_stands_where_it_begins_with_its_goal_and_no_further(tmp_path):
    rerun = pytest.importorskip("rerun", reason="rerun-sdk (extra `view`) is not installed")
    rerun.init("test")
    rerun.save(tmp_path / "plans.rrd")
    row = {name: str(value) for name, value in (PLAN | FOUND).items()}
    _log_plans([row, row | {"horizon": "3"}], 10, 4, np.zeros((4, 16, 16, 3), np.uint8), 4)
    rerun.disconnect()
    shown = show(tmp_path / "plans.rrd")
    for name in ("goal", "camera_deg/plan", "camera_deg/other_goal", "dyaw/planned", "energy/plan", "energy/recorded"):
        assert f"plans/2_steps/{name}" in shown, name
    assert "plans/3_steps" not in shown, "its goal lies behind the run"


def test_an_episode_is_saved_for_a_viewer_elsewhere(checkout, tmp_path):
    pytest.importorskip("rerun", reason="rerun-sdk (extra `view`) is not installed")
    checkout.encode()  # makes nothing, but notes which file is which unit, where frames are looked for
    saved = tmp_path / "x.rrd"
    result = checkout.run("view", "x", "--save", saved)
    assert result.code == 0, result.err
    assert "no predictor in outputs/train" in result.out and f"next: rerun {saved}" in result.out
    shown = show(saved)
    assert all(f"/{name}" in shown for name in ("camera", "tokens/true", "actions/", "states/"))


def test_what_is_lacking_is_said_before_anything_is_shown(checkout, tmp_path, monkeypatch):
    monkeypatch.chdir(checkout.folder)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    for keys, save, words in (
        (["a", "b"], tmp_path / "x.rrd", "shows one episode; got a, b"),
        (["x"], None, r"no screen here; --save FILE\.rrd"),
    ):
        with pytest.raises(ValueError, match=words):
            view(keys, save=save)
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(ValueError, match=r"jepa-cache view needs the library rerun, .* pip install"):
        view(["x"], save=tmp_path / "x.rrd")
