"""What several processes promise, shown with two of them on the CPU (gloo), in the environment that torchrun makes.

Claims:
- with the same global batch they give the losses, gradient norms and weights of one process;
- one process writes, and the others leave when it has; a stop signal to one ends both at one training step with the exit code for a requeue, and
  the same
  command ends as if nothing had happened;
- when one dies, or hangs for longer than the others wait, the other says so and names the checkpoint;
- where the loss of one alone is not finite, in float16 too, both stop at one training step, and none waits for the other;
- processes with other settings than the first one are refused before the first training step.
"""

import os
import signal
import socket
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from jepa_cache.training.signals import REQUEUE_EXIT_CODE
from tests.training import runs
from tests.training.runs import read_csv

EXACT = 1e-5  # relative; sums of other order in float32


@pytest.fixture
def start(cache):
    def started(home: Path, *words: str, others: tuple[str, ...] | None = None):
        """Two processes of one training; the second with other words if there are such."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        given = (words, words if others is None else others)
        return [runs.start(cache, home, *given[n], RANK=n, LOCAL_RANK=n, **env) for n in (0, 1)]

    return started


def finish(processes) -> tuple[list[int], list[str]]:
    return [process.wait() for process in processes], [process.text for process in processes]


def test_two_processes_with_four_windows_each_train_as_one_with_eight(cache, start, tmp_path):
    alone = runs.start(cache, tmp_path / "1", "train.batch_size=8", "train.rollout_start=random")
    pair = start(tmp_path / "2", "train.batch_size=4", "train.rollout_start=random", "slow_end")
    pair[1].wait()
    assert (tmp_path / "2/out/run/predictor.safetensors").is_file(), "none leaves before the first one has written"
    codes, texts = finish(pair)
    assert (alone.wait(), codes) == (0, [0, 0]), (alone.text, texts)
    assert "2 processes" in texts[0] and "trainable" not in texts[1], "only the first one talks"
    for one, two in zip(*(read_csv(tmp_path / name / "out/run") for name in "12"), strict=True):
        for name in ("epoch", "total", "jloss", "sloss", "sloss_h1", "sloss_h2", "grad_norm", "lr", "val_total"):
            assert float(two[name] or 0) == pytest.approx(float(one[name] or 0), rel=EXACT), (one["step"], name)
    one, two = (load_file(tmp_path / name / "out/run/predictor.safetensors") for name in "12")
    worst = max(
        float((one[name] - two[name]).norm() / (one[name].norm() + 1e-12)) for name in one if "bias" not in name
    )
    assert worst < 1e-3  # Adam divides by the gradient's size, so rounding of tiny gradients shows


def test_a_signal_to_one_process_ends_both_at_a_step_and_the_same_command_resumes(start, tmp_path):
    words = ("train.num_steps=30", "train.checkpoint_every=1000", "train.validate_every=0", "train.log_every=1")
    pair = start(tmp_path, "pause", *words)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not any(
        len(path.read_text().splitlines()) > 3 for path in tmp_path.glob("runs/*/train.csv")
    ):
        time.sleep(0.02)
    os.kill(pair[1].pid, signal.SIGUSR1)
    codes, texts = finish(pair)
    assert codes == [REQUEUE_EXIT_CODE] * 2, texts
    (newest,) = tmp_path.glob("runs/*/checkpoints/step-*")
    stopped = int(newest.name.removeprefix("step-"))
    assert 0 < stopped < 30
    codes, texts = finish(start(tmp_path, *words))
    assert codes == [0, 0] and f"resumes at training step {stopped}" in texts[0], texts
    assert [int(row["step"]) for row in read_csv(tmp_path / "out/run")] == list(range(1, 31))


def test_when_one_process_dies_the_other_says_so(start, tmp_path):
    codes, (first, _) = finish(start(tmp_path, "train.checkpoint_every=2", "die_at=6"))
    assert codes == [1, -signal.SIGKILL]
    assert "one of them has died or hangs" in first and "Traceback" not in first, first
    assert (next(tmp_path.glob("runs/*/checkpoints")) / "latest").readlink() == Path("step-00000004")


def test_when_one_process_hangs_the_other_waits_for_a_while_and_says_so(start, tmp_path):
    first, second = start(tmp_path, "train.checkpoint_every=2", "hang_at=6")
    code = first.wait()
    os.kill(second.pid, signal.SIGKILL)
    assert (code, second.wait()) == (1, -signal.SIGKILL)
    assert "cannot reach the others: one of them has died or hangs" in first.text, first.text
    assert "step-00000004" in first.text and "Traceback" not in first.text, first.text


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_loss_that_is_not_finite_in_one_process_ends_both(start, tmp_path, precision):
    words = (f"train.precision={precision}", "train.checkpoint_every=3", "nan_at=6")
    codes, (first, second) = finish(start(tmp_path, *words))
    assert codes == [1, 1] and "Traceback" not in first + second
    assert (
        "a training step of another process was not finite" in first and "at training step 6 the loss is nan" in second
    )
    assert (next(tmp_path.glob("runs/*/checkpoints")) / "latest").readlink() == Path("step-00000003")


def test_processes_with_other_settings_train_nothing_and_name_what_differs(start, tmp_path):
    given = ("train.lr=0.003", "train.batch_size=4", "train.seed=0")
    codes, texts = finish(start(tmp_path, *given, others=("train.lr=0.002", "train.batch_size=2", "train.seed=1")))
    assert codes == [1, 1]
    for text in texts:
        assert "Traceback" not in text and "error: process 1 would train another run than process 0" in text
        assert all(f"train.{word}" in text for word in ("lr: 0.003 -> 0.002", "batch_size", "seed")), text
    assert not (tmp_path / "runs").exists()
