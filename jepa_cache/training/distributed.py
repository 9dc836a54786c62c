"""The processes of one training: one without a launcher, several under torchrun, accelerate launch or SLURM's srun."""

from __future__ import annotations

import json
import os
import platform
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

from jepa_cache.config.schema import TrainConfig
from jepa_cache.devices import resolve_device
from jepa_cache.store.recipe import canonical_json, recipe_changes
from jepa_cache.training.checkpoint import FOLDER, describe_last

# What `accelerate config` and `accelerate launch` may set, and would wrap or shard the model.
REFUSED = tuple(
    f"ACCELERATE_USE_{name}" for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER")
)
# What launchers set; of other values Accelerate's errors name no variable.
RULES = {"ACCELERATE_TORCH_DEVICE": ("cpu or cuda", r"cpu|cuda(:\d+)?")}
RULES |= dict.fromkeys(
    ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"),
    ("an integer", r"\s*-?\d+\s*"),
)
RULES |= dict.fromkeys(
    ("ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY", "FORK_LAUNCHED"),
    ("true or false", "y|yes|t|true|on|1|n|no|f|false|off|0"),
)
UNSET = "Launchers set it: start by torchrun or accelerate launch, or unset what one left here, to train in one process"
# Compiling may keep one process waiting for another. A process that died is mostly noticed at once, see `agree`.
TIMEOUT = timedelta(minutes=4)
PATIENCE = timedelta(days=1)  # while the first process fetches a run, or writes what came of it


def start_processes(settings: TrainConfig) -> Accelerator:
    """Join the processes that RANK and WORLD_SIZE tell of: gloo between CPUs, NCCL between GPUs with gloo for what CPUs agree on.

    Of Accelerate's environment only what says which processes there are is heeded: precision and compilation are those of the settings.

    Raises:
        ValueError: `check_environment` refuses, two processes have one GPU, or `train.compile=flex` is set on a CPU.
    """
    device = resolve_device("train.device", settings.device)
    check_environment(os.environ)
    if settings.compile == "flex" and device == "cpu":
        raise ValueError(
            "train.compile=flex needs a GPU: FlexAttention has no backward pass on a CPU. Set it to false or true"
        )
    group = InitProcessGroupKwargs(timeout=TIMEOUT)
    if device == "cuda" and int(os.environ.get("LOCAL_RANK", -1)) >= 0:
        group.backend = "cpu:gloo,cuda:nccl"
        if torch.cuda.device_count() == 1:
            os.environ["LOCAL_RANK"] = "0"  # where every process is shown one GPU, this is its number
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision="no",
        dynamo_backend="no",
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True), group],
    )
    here = accelerator.device
    # Another GPU than the current one: copies would run on the streams of one, kernels on those of the other, and not wait for each other.
    if here.type != device or (here.type == "cuda" and here.index not in (None, torch.cuda.current_device())):
        raise ValueError(
            f"train.device is {settings.device!r}, here {device}, but Accelerate's environment asks for {here}; unset "
            "ACCELERATE_USE_CPU and ACCELERATE_TORCH_DEVICE, and set train.device (which of several GPUs: CUDA_VISIBLE_DEVICES=1)"
        )
    if device == "cuda" and accelerator.num_processes > 1:
        uuid = str(torch.cuda.get_device_properties(accelerator.device).uuid)
        check_own_gpus(_gather(accelerator, f"{platform.node()} {uuid}"))
    return accelerator


def check_environment(variables: Mapping[str, str]) -> None:
    """Refuse what a launcher cannot mean, before Accelerate fails on it without its name, or waits for processes that do not exist.

    Raises:
        ValueError: The model would be sharded, a number or switch is none, or a process has a number that its launch does not have.
    """
    if asked := [name for name in REFUSED if variables.get(name, "false").lower() not in ("", "0", "false", "no")]:
        raise ValueError(
            f"{asked[0]} is set, but training is data-parallel (DDP) only: every GPU holds the whole predictor. Run `accelerate config` again "
            "for multi-GPU without FSDP or DeepSpeed, or start by torchrun"
        )
    for name, (rule, pattern) in RULES.items():
        if name in variables and not re.fullmatch(pattern, variables[name].lower()):
            raise ValueError(f"the environment variable {name} must be {rule}; got {variables[name]!r}. {UNSET}")
    for number, count in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if {number, count} <= variables.keys() and int(variables[number]) >= int(variables[count]):
            raise ValueError(
                f"the environment variable {number} must be below {count}, as processes count from 0; got {variables[number]} of "
                f"{variables[count]}. {UNSET}"
            )


def check_own_gpus(gpus: Sequence[str]) -> None:
    """Refuse a launch in which two processes have one GPU, which NCCL would fail or hang on; `gpus` are host and uuid of each."""
    owners = defaultdict(list)
    for number, gpu in enumerate(gpus):
        owners[gpu].append(number)
    if shared := [(gpu, numbers) for gpu, numbers in owners.items() if len(numbers) > 1]:
        raise ValueError(
            f"processes {', '.join(map(str, shared[0][1]))} have one GPU ({shared[0][0]}), but each needs its own: start as many processes as "
            "there are GPUs (torchrun --nproc-per-node), or show every task another one (srun --gpus-per-task=1)"
        )


def end_processes(accelerator: Accelerator) -> None:
    """Leave the other processes in order, once all are here: NCCL ends together, and the first one may write and upload for minutes.

    Otherwise the threads of the process group sometimes abort the interpreter at its end, and a training that ended
    well would be reported as failed (torch 2.13 with gloo: two launches of three of a script that ends at once).
    """
    wait_for_first(accelerator)
    if accelerator.num_processes > 1:
        torch.distributed.destroy_process_group()


def agree(accelerator: Accelerator, *here: bool) -> list[bool]:
    """Return of each whether it holds in any process; the same answers in all, so that all act alike at one training step.

    By the CPUs alone, so that it waits for no GPU, and fails at once where a process has died.
    """
    if accelerator.num_processes == 1:
        return list(here)
    anywhere = torch.tensor(here, dtype=torch.uint8)
    torch.distributed.all_reduce(anywhere, op=torch.distributed.ReduceOp.MAX)
    return anywhere.bool().tolist()


def wait_for_first(accelerator: Accelerator) -> None:
    """Wait until all have come here, a day if need be, as the first one may have a run to fetch or weights to write."""
    if accelerator.num_processes > 1:
        torch.distributed.barrier(torch.distributed.new_group(backend="gloo", timeout=PATIENCE))


def _gather(accelerator: Accelerator, value: Any) -> list[Any]:
    """The values of all processes, in their order."""
    values = [value] * accelerator.num_processes
    if accelerator.num_processes > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def check_same(accelerator: Accelerator, what: dict[str, Any]) -> None:
    """Raise a ValueError in every process that lists what differs in one: settings, manifest, code, or training step."""
    others = _gather(accelerator, json.loads(canonical_json(what)))
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
            f"process {accelerator.process_index} of {accelerator.num_processes} cannot reach the others: one of them has died or hangs "
            f"(its own message is above or in its log). Nothing was overwritten, {describe_last(run / FOLDER)}, and the same "
            f"command resumes. ({str(error).splitlines()[0]})"
        ) from error
