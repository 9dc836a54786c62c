"""What a checkpoint promises to a training that was interrupted.

Claims:
- what is saved is what is loaded;
- the newest are kept, those at multiples of a spacing and the best one by the metric, with `latest` and `best` on theirs;
- a full disk harms no checkpoint that was there (for kills see test_trainer.py);
- in the background what was handed over is written, whatever becomes of it meanwhile, and what goes wrong is raised;
- a damaged checkpoint is named, whatever part of it was hit, and removing it leads back to the one before.
"""

import shutil
import threading
from contextlib import closing
from pathlib import Path

import pytest
import torch

from jepa_cache.files import DiskFullError
from jepa_cache.training.checkpoint import (
    BackgroundWriter,
    Best,
    Checkpoint,
    load_latest,
    save_checkpoint,
    tidy,
)
from tests.faults import small_disk


def make(step: int, best: Best | None = None) -> Checkpoint:
    weights = {name: torch.full((3, 2), step + offset) for name, offset in (("a.weight", 0.25), ("b.bias", 0.5))}
    moments = {"state": {0: {"step": torch.tensor(float(step)), "exp_avg": torch.full((3, 2), step * 0.125)}}}
    groups = [{"lr": 0.1 * step, "betas": (0.9, 0.999), "decays": True, "params": [0]}]
    scaler = {"scale": 65536.0 / step, "_growth_tracker": step}
    return Checkpoint(step, weights, moments | {"param_groups": groups}, scaler, num_threads=step, best=best or Best())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_equal(one: Checkpoint | None, other: Checkpoint) -> None:
    assert one is not None and one.step == other.step
    assert all(torch.equal(one.weights[name], tensor) for name, tensor in other.weights.items())
    assert torch.equal(one.optimizer["state"][0]["exp_avg"], other.optimizer["state"][0]["exp_avg"])
    assert one.optimizer["param_groups"] == other.optimizer["param_groups"]
    assert (one.gradient_scaler, one.num_threads, one.best) == (other.gradient_scaler, other.num_threads, other.best)


def test_what_is_saved_is_loaded_and_the_newest_two_stay_with_latest_on_the_newest(tmp_path):
    assert load_latest(tmp_path) is None
    for step in (5, 10, 15, 100):
        save_checkpoint(tmp_path, make(step))
        assert (tmp_path / "latest").readlink() == Path(f"step-{step:08d}")
        assert_equal(load_latest(tmp_path), make(step))
    assert names(tmp_path) == ["latest", "step-00000015", "step-00000100"]


def test_multiples_of_a_spacing_and_the_best_checkpoint_stay(tmp_path):
    for step in range(1, 10):
        save_checkpoint(tmp_path, make(step, Best(min(step, 2), 1.0)), keep_every=4)
    assert names(tmp_path) == ["best", "latest", *(f"step-{step:08d}" for step in (2, 4, 8, 9))]
    assert (tmp_path / "best").readlink() == Path("step-00000002")


@pytest.mark.parametrize("num_bytes", [40_000, 100_000], ids=["the weights do not fit", "the optimiser does not fit"])
def test_a_full_disk_is_one_message_and_leaves_the_checkpoints_that_were_there(tmp_path, num_bytes):
    checkpoint = make(2)._replace(
        weights={"weight": torch.zeros(16_000)}, optimizer={"state": {0: torch.zeros(16_000)}, "param_groups": []}
    )
    with small_disk(tmp_path / "disk", num_bytes) as disk:
        save_checkpoint(disk, make(1))
        for _ in range(2):
            with pytest.raises(
                DiskFullError, match=rf"No space left on device: {disk}/step-00000002 cannot be written, "
            ):
                save_checkpoint(disk, checkpoint)
            assert names(disk) == ["latest", "step-00000001"]
        assert_equal(load_latest(disk), make(1))


def test_in_the_background_what_was_handed_over_is_written_while_training_changes_it(tmp_path):
    may_write, training = threading.Event(), make(1)
    with closing(BackgroundWriter(lambda it: (may_write.wait(20), save_checkpoint(tmp_path, it)))) as writer:
        writer.save(training)
        assert not (tmp_path / "step-00000001").exists(), "not waited for"
        writer.settle()
        for tensor in (*training.weights.values(), training.optimizer["state"][0]["exp_avg"]):
            tensor.fill_(-1)
        may_write.set()
    assert_equal(load_latest(tmp_path), make(1))


def test_what_goes_wrong_in_the_background_is_raised_once_by_whatever_comes_next():
    def fail(_: Checkpoint) -> None:
        raise DiskFullError(28, "full")

    for ask in (BackgroundWriter.join, BackgroundWriter.close, lambda writer: writer.save(make(2))):
        writer = BackgroundWriter(fail)
        writer.save(make(1))
        with pytest.raises(DiskFullError, match="full"):
            ask(writer)
        writer.join()
        writer.close()


@pytest.mark.parametrize("name", ["predictor.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_checkpoint_is_named_and_removing_it_leads_back_to_the_one_before(tmp_path, name, damage):
    for step in (1, 2):
        save_checkpoint(tmp_path, make(step))
    path = tmp_path / "step-00000002" / name
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        # The last digit of the last tensor, an inner byte of the zip file, the number of the training step.
        position = {"predictor.safetensors": -1, "optimizer.pt": len(content) // 2, "state.json": content.index(b"2")}[
            name
        ]
        content[position] ^= 1
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"step-00000002 is damaged .*delete this folder.*--fresh"):
        load_latest(tmp_path)
    shutil.rmtree(tmp_path / "step-00000002")
    assert_equal(load_latest(tmp_path), make(1))
    tidy(tmp_path, 2, 0)
    assert (tmp_path / "latest").readlink() == Path("step-00000001")
