"""Claims: what benchmarks/gpu_check.py checks holds on this machine's GPU; and on a CPU every part of it runs at tiny sizes, the quick ones always."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_checks import CHECKS, Bench
from jepa_cache.devices import resolve_device
from tests import caches

ROOT = Path(__file__).resolve().parents[2]
without_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
PARTS = ("C1", "C5", "C8", "B2")  # of either kind; each import of torch more costs 4 s
SLOW = ("E", "C2", "C3", "C4", "C6", "C7", "B1", "B3", "B4", "B5", "B6", "C9")


@pytest.mark.gpu
@without_gpu
@pytest.mark.parametrize("name", CHECKS)
def test_what_is_promised_holds_on_the_gpu(name, tmp_path, monkeypatch):
    for variable, value in {"JEPA_RUNS_HOME": tmp_path, "XDG_STATE_HOME": tmp_path / "state"}.items():
        monkeypatch.setenv(variable, str(value))
    for size in ("GRID", "WIDTH"):
        monkeypatch.setattr(caches, size, getattr(caches, size))
    lines = list(CHECKS[name][1](Bench(torch.device(resolve_device("the GPU", "cuda")), tmp_path)))
    assert not [line for line in lines if line[-1] == "WRONG"], lines


def dry_run(tmp_path: Path, *parts: str) -> dict:
    command = [sys.executable, str(ROOT / "benchmarks/gpu_check.py"), "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--only", *parts], capture_output=True, text=True, timeout=500)
    written = json.loads((tmp_path / "gpu_check.json").read_text())
    wrong = [line for line in written["lines"] if line["verdict"] not in ("ok", "")]
    assert done.returncode == 0 and not wrong, f"{wrong}\n{done.stderr[-3000:]}"
    assert {line["part"] for line in written["lines"]} == set(parts)
    table = (tmp_path / "gpu_check.md").read_text().splitlines()
    assert len(table) == len(written["lines"]) + 4 and all(line.count("|") == 6 for line in table[2:])
    return written


def test_the_script_runs_on_a_cpu_at_tiny_sizes(tmp_path):
    written = dry_run(tmp_path, *PARTS)
    assert written["machine"]["device"] == "cpu"
    assert not [line for line in written["lines"] if line["part"][0] in "EB" and line["verdict"]], "of figures of a CPU"


@pytest.mark.long
@pytest.mark.parametrize("part", SLOW)
def test_its_slow_parts_run_on_a_cpu_too(tmp_path, part):
    dry_run(tmp_path, part)
