"""Claims of cli/view.py: an episode goes into a file with its frames, tokens and actions; without screen or library one message says what to do."""

import os
import subprocess
import sys

import pytest

from jepa_cache.cli.view import view


def test_an_episode_is_saved_for_a_viewer_elsewhere(checkout, tmp_path):
    pytest.importorskip("rerun", reason="rerun-sdk (extra `view`) is not installed")
    checkout.encode()  # makes nothing, but notes which file is which unit, where frames are looked for
    saved = tmp_path / "x.rrd"
    result = checkout.run("view", "x", "--save", saved)
    assert result.code == 0, result.err
    assert "no predictor in outputs/train" in result.out and f"next: rerun {saved}" in result.out
    command = [sys.executable, "-m", "rerun", "rrd", "print", str(saved)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # wherever this process has rerun from
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout
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
