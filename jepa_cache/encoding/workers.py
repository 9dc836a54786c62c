"""Stage one on several processes by Dask, one task for each unit: on this machine, or the workers of a cluster."""

from __future__ import annotations

import asyncio
import functools
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from jepa_cache.config.parsing import ConfigError
from jepa_cache.config.paths import default_num_decoders, is_full_gpu
from jepa_cache.encoding.actions import ensure_actions
from jepa_cache.encoding.groups import EncodingGroup, name_reading, token_recipe
from jepa_cache.encoding.pipeline import FillResult, fill_group
from jepa_cache.encoding.task import load_encoder, resolve_device
from jepa_cache.store.recipe import recipe_changes
from jepa_cache.store.root import CacheRoot

if TYPE_CHECKING:
    from dask.distributed import Client


CONNECT_S = 30
START_S = 120  # a worker imports from a cold disk
GPU = "GPU"
RETRIES = 2  # after an error that is not the input's: the disk, the network


class Connection(NamedTuple):
    """A client of a scheduler whose workers can do the work, and on which device, "cpu" or "cuda", they do it."""

    client: Client
    device: str
    num_decoders: int = 0  # of every worker where the settings leave it open; 0: one for each core


def connect(workers: int | str, device: str, num_threads: int) -> AbstractContextManager[Connection]:
    """Start so many processes on this machine, or check that the workers of a scheduler can do the work.

    `device` is as configured: "auto", "cpu" or "cuda"; `num_threads` are the torch threads of every worker.

    Raises:
        ValueError: No process; or no scheduler or worker answers, or none offers a requested GPU.
    """
    if isinstance(workers, str):
        return _connect_to_cluster(workers, device)
    if workers < 1:
        raise ValueError(f"the number of workers must be at least 1; got {workers}")
    return _start_local(workers, resolve_device(device), num_threads)


@contextmanager
def _start_local(num_workers: int, device: str, num_threads: int) -> Iterator[Connection]:
    from dask.distributed import Client, Nanny, Scheduler, SpecCluster
    from distributed.system import MEMORY_LIMIT

    environments: list[dict[str, str]] = [{} for _ in range(num_workers)]
    if device == "cuda":
        import torch

        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
        # Set before the worker starts, hence before it imports torch.
        environments = [{"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} for number in range(num_workers)]
    elif num_workers * num_threads > (os.cpu_count() or 1):
        print(
            f"note: {num_workers} workers of {num_threads} torch threads share {os.cpu_count()} cores; another number of "
            "threads could change the last bits of tokens, so it is not lowered"
        )
    with tempfile.TemporaryDirectory(prefix="jepa-cache-workers-") as folder:
        here: dict[str, Any] = {"host": "127.0.0.1", "dashboard": False}
        options = here | {"nthreads": 1, "local_directory": folder, "memory_limit": MEMORY_LIMIT // num_workers}
        options |= {"death_timeout": START_S, "silence_logs": "WARNING", "resources": {GPU: int(device == "cuda")}}
        scheduler = {"cls": Scheduler, "options": here | {"port": 0, "dashboard_address": ":0"}}
        specs = {number: {"cls": Nanny, "options": {**options, "env": env}} for number, env in enumerate(environments)}
        # No warnings: at the end a process may take longer to end than its nanny waits, when all results are here.
        with (
            SpecCluster(scheduler=scheduler, workers=specs, silence_logs="ERROR") as cluster,
            Client(cluster, timeout=START_S) as client,
        ):
            client.wait_for_workers(num_workers, timeout=START_S)
            yield Connection(client, device, max(1, default_num_decoders() // num_workers))


@contextmanager
def _connect_to_cluster(address: str, wanted: str) -> Iterator[Connection]:
    from dask.distributed import Client

    try:
        client = Client(address, timeout=CONNECT_S)
    except (OSError, ValueError, TimeoutError) as error:
        raise ValueError(
            f"no Dask scheduler answers at {address} ({error}); start one with `dask scheduler` and give its address, such "
            "as tcp://node:8786"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=CONNECT_S)
        except TimeoutError as error:
            raise ValueError(
                f"the scheduler at {address} has no worker after {CONNECT_S} s; start some with "
                f"`dask worker {address} --nthreads 1`"
            ) from error
        listed = client.scheduler_info(n_workers=-1)["workers"]
        yield Connection(client, _choose_device(listed, address, wanted))


def _choose_device(workers: Mapping[str, Mapping[str, Any]], address: str, wanted: str) -> str:
    """What the workers of a cluster encode on, from what the scheduler lists of them."""
    several = sorted(name for name, worker in workers.items() if worker["nthreads"] != 1)
    if several:
        raise ValueError(
            f"{len(several)} workers of {address} take several tasks at a time (first: {several[0]}), but one task uses a "
            "worker wholly; start them with `--nthreads 1`"
        )
    offered = any(worker["resources"].get(GPU, 0) >= 1 for worker in workers.values())
    if wanted == "cuda" and not offered:
        raise ConfigError(
            f"encode.device=cuda, but none of the {len(workers)} workers of {address} offers a GPU; start them with "
            f"`--resources {GPU}=1` and one visible GPU each, or set encode.device=cpu"
        )
    if wanted == "auto" and not offered:
        print(f"note: no worker of {address} offers a GPU (`--resources {GPU}=1`): encoding on their CPUs")
    return "cuda" if offered and wanted != "cpu" else "cpu"


class EncodeFailedError(ValueError):
    """Some units could not be encoded; the message lists them. All others are in the cache."""


def encode_on_workers(
    groups: Sequence[EncodingGroup], root: CacheRoot, connection: Connection
) -> Iterator[tuple[EncodingGroup, FillResult | str]]:
    """Encode every unit of the groups on Dask workers, which also sum up its actions.

    A unit whose worker dies goes to another one. What cannot be encoded at all does not stop the rest.

    Yields a group of one unit as it ends, with what became of it, or why it cannot be encoded.

    Raises:
        ValueError: The scheduler is gone.
    """
    from dask.distributed import as_completed

    encode = groups[0].encode
    encode = replace(encode, device=connection.device, num_decoders=encode.num_decoders or connection.num_decoders)
    tasks = [replace(group.of_units((unit,)), encode=encode) for group in groups for unit in group.units]
    # Impure: under another run's key Dask would hand out what became of the unit then.
    client, resources = connection.client, {GPU: 1} if connection.device == "cuda" else {}
    options = {"pure": False, "retries": RETRIES, "resources": resources}
    futures = {client.submit(encode_unit, task, root, **options): task for task in tasks}
    try:
        for future in as_completed(futures):
            task = futures.pop(future)  # then it is forgotten: it need not run again if its worker dies later
            try:
                yield task, future.result()
            except (Exception, asyncio.CancelledError) as error:
                if client.status != "running":
                    raise ValueError(
                        f"the Dask scheduler {client.scheduler.address} is gone ({error}); the same command continues"
                    ) from error
                yield task, _explain(error)
    finally:
        if client.status == "running":
            client.cancel(list(futures))


def _explain(error: BaseException) -> str:
    from dask.distributed import KilledWorker

    if isinstance(error, KilledWorker):
        return (
            f"{error.allowed_failures + 1} workers died while encoding it, the last at {error.last_worker.address} (out of "
            "memory, or a fault in a decoder? see the worker's log)"
        )
    return f"{type(error).__name__}: {error}"


def encode_unit(task: EncodingGroup, root: CacheRoot) -> FillResult | str:
    """Encode the one unit of a group and sum up its actions; what became of it, or why that cannot be.

    Runs in a worker, and maybe again, when its result was lost with its worker: then it finds the store.

    Raises:
        OSError: The disk or the network failed; Dask tries again.
    """
    from dask.distributed import get_worker

    try:
        _check_recipe(task, get_worker().address)
        encoder = _load_once(task.encoder, task.encode, task.num_threads)
        filled = fill_group(task, encoder, root)
        if not filled.busy and not filled.unreadable:
            for unit in task.units:
                ensure_actions(root, task, unit)
    except ValueError as error:  # what a user can cause; no use trying again
        return "\n    ".join([str(error), *getattr(error, "__notes__", [])])
    except RuntimeError as error:
        if not is_full_gpu(error):
            raise
        return (
            f"the GPU's memory is full ({str(error).splitlines()[0]}); lower encode.batch_size, or start fewer workers"
        )
    return filled


def _check_recipe(task: EncodingGroup, address: str) -> None:
    """Check that this worker would make the stores that the task names; `load_encoder` checks the weights."""
    source = name_reading(task.source.recipe, task.recipe["source"].get("reading", 1))
    recipe = token_recipe(task.encode, task.encoder.preset, source, task.encoder.identity, phase=task.phase)
    if changes := recipe_changes(task.recipe, recipe):
        raise ValueError(
            f"the worker {address} would make something else ({'; '.join(changes)}); start it from the same checkout"
        )


_load_once = functools.lru_cache(maxsize=1)(load_encoder)
