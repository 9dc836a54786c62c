"""What several processes promise, shown with two of them on the CPU (gloo), started by torchrun.

Claims:
- with the same global batch they give the losses, gradient norms and weights of one process;
- one process writes; a stop signal to one ends both at one training step with the exit code for a requeue, and going on ends as if
  nothing had happened;
- when one dies, the other says so and names the checkpoint;
- processes with other settings than the first one are refused before the first training step.
"""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from jepa_cache.training.signals import REQUEUE_EXIT_CODE
from tests.caches import Cache

EXACT = 1e-5  # relative; sums of other order in float32


def run_training(workspace: str, output: str, *overrides: str) -> None:
    """In each process: train on the cache of `workspace`; `die_at=K` kills process 1 at training step K, `pause` slows each down."""
    from jepa_cache.data.cache import open_dataset
    from jepa_cache.data.scaler import read_scaler
    from jepa_cache.training import trainer
    from tests.caches import make_config

    die_at = [int(word.partition("=")[2]) for word in overrides if word.startswith("die_at=")]
    config = make_config(*(word for word in overrides if word.startswith(("train.", "cache."))))
    step = trainer.train_step

    def watched(*arguments):
        if die_at and arguments[-1] == die_at[0] and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        if "pause" in overrides:
            time.sleep(0.1)
        return step(*arguments)

    trainer.train_step = watched
    dataset, scaler = open_dataset(config, Path(workspace)), read_scaler(Path(workspace) / "outputs/scaler/scaler.json")
    try:
        result = trainer.train(config, dataset, scaler, Path(output) / "run", base=Path(output))
    except ValueError as error:
        sys.exit(f"error: {error}")
    if result.stopped_by is not None:
        sys.exit(REQUEUE_EXIT_CODE)


def start(cache: Cache, output: Path, *overrides: str, num_processes: int, rank: int = 0, port: int = 0):
    """One process of a training; the environment is what torchrun, accelerate launch and srun set."""
    code = "import sys; from tests.training.test_processes import run_training; run_training(*sys.argv[1:])"
    environment = os.environ | {
        "JEPA_RUNS_HOME": str(output / "runs"),
        "OMP_NUM_THREADS": "1",
    }
    if num_processes > 1:
        environment |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    return subprocess.Popen(
        [sys.executable, "-c", code, str(cache.folder), str(output), f"cache.root={cache.root.path}", *overrides],
        cwd=output,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def start_two(cache: Cache, output: Path, port: int, *overrides: str) -> list[subprocess.Popen]:
    return [start(cache, output, *overrides, num_processes=2, rank=rank, port=port) for rank in (0, 1)]


def finish(*processes: subprocess.Popen) -> list[str]:
    return [process.communicate(timeout=120)[0] for process in processes]


def rows(output: Path) -> list[dict[str, str]]:
    with (output / "run/train.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def alone(cache, tmp_path_factory) -> Path:
    """One process with windows of eight a batch."""
    output = tmp_path_factory.mktemp("alone")
    process = start(cache, output, "train.batch_size=8", "train.rollout_start=random", num_processes=1)
    (text,) = finish(process)
    assert process.returncode == 0, text
    return output


def test_two_processes_with_four_windows_each_train_as_one_with_eight(cache, tmp_path, alone):
    pair = start_two(cache, tmp_path, free_port(), "train.batch_size=4", "train.rollout_start=random")
    texts = finish(*pair)
    assert [process.returncode for process in pair] == [0, 0], texts
    assert "2 processes" in texts[0] and "trainable" not in texts[1], "only the first one talks"
    for one, two in zip(rows(alone), rows(tmp_path), strict=True):
        for name in ("epoch", "total", "jloss", "sloss", "sloss_h1", "sloss_h2", "grad_norm", "lr", "val_total"):
            assert float(two[name] or 0) == pytest.approx(float(one[name] or 0), rel=EXACT), (one["step"], name)
    one, two = (load_file(folder / "run/predictor.safetensors") for folder in (alone, tmp_path))
    worst = max(
        float((one[name] - two[name]).norm() / (one[name].norm() + 1e-12)) for name in one if "bias" not in name
    )
    assert worst < 1e-3  # Adam divides by the gradient's size, so rounding of tiny gradients shows


def test_a_signal_to_one_process_ends_both_at_a_step_and_the_same_command_goes_on(cache, tmp_path):
    slow = ("pause", "train.num_steps=40", "train.checkpoint_every=1000", "train.validate_every=0", "train.log_every=1")
    pair = start_two(cache, tmp_path, free_port(), *slow)
    log = tmp_path / "runs"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not any(
        len(path.read_text().splitlines()) > 3 for path in log.glob("*/train.csv")
    ):
        time.sleep(0.05)
    pair[1].send_signal(signal.SIGUSR1)
    texts = finish(*pair)
    assert [process.returncode for process in pair] == [REQUEUE_EXIT_CODE] * 2, texts
    (newest,) = log.glob("*/checkpoints/step-*")
    stopped = int(newest.name.removeprefix("step-"))
    assert 0 < stopped < 40
    again = start_two(cache, tmp_path, free_port(), *slow)
    texts = finish(*again)
    assert [process.returncode for process in again] == [0, 0], texts
    assert f"resumes at training step {stopped}" in texts[0]
    assert [int(row["step"]) for row in rows(tmp_path)] == list(range(1, 41))


def test_when_one_process_dies_the_other_says_so(cache, tmp_path):
    pair = start_two(cache, tmp_path, free_port(), "train.checkpoint_every=2", "die_at=6")
    first, _ = finish(*pair)
    assert pair[1].returncode == -signal.SIGKILL
    assert pair[0].returncode == 1 and "one of them has died" in first and "Traceback" not in first, first
    assert (next((tmp_path / "runs").glob("*/checkpoints")) / "latest").readlink() == Path("step-00000004")


def test_processes_with_other_settings_train_nothing_and_name_what_differs(cache, tmp_path):
    port, given = free_port(), ("train.lr=0.003", "train.batch_size=4", "train.seed=0")
    other = ("train.lr=0.002", "train.batch_size=2", "train.seed=1")
    pair = [
        start(cache, tmp_path, *settings, num_processes=2, rank=rank, port=port)
        for rank, settings in enumerate((given, other))
    ]
    for process, text in zip(pair, finish(*pair), strict=True):
        assert process.returncode == 1 and "Traceback" not in text, text
        assert "error: process 1 would train another run than process 0" in text
        assert all(f"train.{word}" in text for word in ("lr: 0.003 -> 0.002", "batch_size", "seed")), text
    assert not (tmp_path / "runs").exists()
