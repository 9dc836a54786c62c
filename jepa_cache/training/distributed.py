"""The processes of one training: one without a launcher, several under torchrun, accelerate launch or SLURM's srun."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from jepa_cache.config.paths import resolve_device
from jepa_cache.config.schema import TrainConfig
from jepa_cache.store.recipe import canonical_json, recipe_changes
from jepa_cache.training.checkpoint import FOLDER, describe_last
from jepa_cache.training.signals import StopRequest


def start_processes(settings: TrainConfig) -> Accelerator:
    """Join the processes that RANK and WORLD_SIZE tell of; gloo between CPUs, NCCL between GPUs."""
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    resolve_device("train.device", settings.device, torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return Accelerator(cpu=settings.device == "cpu", kwargs_handlers=[ddp])


def end_processes(accelerator: Accelerator) -> None:
    """Leave the other processes in order, without waiting for them.

    Otherwise the threads of the process group sometimes abort the interpreter at its end, and a training that ended
    well would be reported as failed (torch 2.13 with gloo: two launches of three of a script that ends at once).
    """
    if accelerator.num_processes > 1:
        torch.distributed.destroy_process_group()


def agree_to_stop(accelerator: Accelerator, request: StopRequest) -> bool:
    """Return whether any process got a signal; the same answer in all, so that all stop at the same training step."""
    if accelerator.num_processes == 1:
        return request.name is not None
    stopping = torch.tensor(float(request.name is not None), device=accelerator.device)
    return bool(accelerator.reduce(stopping, reduction="sum") > 0)


def check_same(accelerator: Accelerator, what: dict[str, Any]) -> None:
    """Raise a ValueError in every process that lists what differs in one: settings, manifest, code, or training step."""
    if accelerator.num_processes == 1:
        return
    others: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(others, json.loads(canonical_json(what)))
    for number, other in enumerate(others):
        if changes := recipe_changes(others[0], other):
            raise ValueError(
                f"process {number} would train another run than process 0 ({'; '.join(changes)}): give all processes of a training the same "
                "command, params.yaml, manifest, code and a $JEPA_RUNS_HOME that they share. Nothing was trained"
            )


@contextmanager
def watched_processes(accelerator: Accelerator, run: Path) -> Iterator[None]:
    """Turn the failure of a collective operation, which is how a dead process shows in the others, into a ValueError."""
    try:
        yield
    except RuntimeError as error:
        words = ("gloo", "nccl", "connection closed", "connection reset", "timed out", "broken pipe", "peer")
        collective = isinstance(error, torch.distributed.DistError) or any(word in str(error).lower() for word in words)
        if accelerator.num_processes == 1 or not collective:
            raise
        raise ValueError(
            f"process {accelerator.process_index} of {accelerator.num_processes} cannot reach the others: one of them has died "
            f"(its own message is above or in its log). Nothing was overwritten, {describe_last(run / FOLDER)}, and the same "
            f"command resumes. ({str(error).splitlines()[0]})"
        ) from error
