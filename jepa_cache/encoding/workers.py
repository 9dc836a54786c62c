"""Stage one on several processes by Dask: processes on this machine, each with a GPU of its own, or the workers of a cluster.

One task for each unit; `encode_on_workers` sends them and collects what became of each.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from jepa_cache.config.schema import EncodeConfig
from jepa_cache.encoding.groups import EncodingGroup, OpenedEncoder, name_reading, token_recipe
from jepa_cache.encoding.pipeline import ProgressBar, Timing
from jepa_cache.encoding.task import (
    Unreadable,
    ensure_actions,
    fill_group,
    load_encoder,
    resolve_device,
    wait_for_others,
)
from jepa_cache.store.recipe import recipe_changes
from jepa_cache.store.root import CacheRoot

if TYPE_CHECKING:
    from dask.distributed import Client

    from jepa_cache.encoder.frozen import FrozenEncoder

CONNECT_S = 30
START_S = 120  # a worker imports from a cold disk
GPU = "GPU"
RETRIES = 2  # after an error that is not the input's: the disk, the network, a GPU out of memory
REPORT_S = 1.0  # between two reports of a task
_one_at_a_time = threading.Lock()


class Connection(NamedTuple):
    """A client of a scheduler whose workers can do the work; `resources` are what each task takes of a worker's."""

    client: Client
    address: str
    num_workers: int
    device: str
    resources: Mapping[str, float]


@dataclass(frozen=True)
class Workers:
    """That many processes on this machine, or those of the Dask scheduler at an address.

    Raises:
        ValueError: Both or neither are given, or the number is below one.
    """

    num_local: int | None = None
    scheduler: str | None = None

    def __post_init__(self) -> None:
        """Check that one of the two is given."""
        if (self.num_local is None) == (self.scheduler is None):
            raise ValueError("give either a number of workers on this machine or the address of a scheduler")
        if self.num_local is not None and self.num_local < 1:
            raise ValueError(f"the number of workers must be at least 1; got {self.num_local}")

    @contextmanager
    def connect(self, device: str, num_threads: int) -> Iterator[Connection]:
        """Start the processes, or check that those of the cluster can do the work.

        Args:
            device: As configured: "auto", "cpu" or "cuda".
            num_threads: Torch threads of every worker.

        Raises:
            ValueError: Too few GPUs here; or no scheduler or worker answers, or none offers a GPU that is asked for.
        """
        if device.startswith("cuda:"):
            raise ValueError(
                f"encode.device={device} names one GPU, but every worker takes one of its own; set encode.device=cuda"
            )
        if self.scheduler is not None:
            with _connect_to_cluster(self.scheduler, device) as connection:
                yield connection
        else:
            with _start_local(self.num_local or 1, device, num_threads) as connection:
                yield connection


@contextmanager
def _start_local(num_workers: int, wanted: str, num_threads: int) -> Iterator[Connection]:
    from dask.distributed import Client, Nanny, Scheduler, SpecCluster
    from distributed.system import MEMORY_LIMIT

    device = resolve_device(wanted)
    environments: list[dict[str, str]] = [{} for _ in range(num_workers)]
    if device == "cuda":
        gpus = _visible_gpus()
        if num_workers > len(gpus):
            raise ValueError(
                f"{num_workers} workers need a GPU each, but this machine shows {len(gpus)}; use --workers {len(gpus)}, or "
                "set encode.device=cpu"
            )
        # Set before the worker starts, hence before it imports torch.
        environments = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:num_workers]]
    elif num_workers * num_threads > (os.cpu_count() or 1):
        print(
            f"note: {num_workers} workers of {num_threads} torch threads share {os.cpu_count()} cores; another number of "
            "threads could change the last bits of tokens, so it is not lowered"
        )
    with tempfile.TemporaryDirectory(prefix="jepa-cache-workers-") as folder:
        options: dict[str, Any] = {
            "nthreads": 1,
            "host": "127.0.0.1",
            "dashboard": False,
            "local_directory": folder,
            "memory_limit": MEMORY_LIMIT // num_workers,
            "death_timeout": START_S,
            "silence_logs": "WARNING",
        }
        scheduler = {
            "cls": Scheduler,
            "options": {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": ":0"},
        }
        specs = {
            number: {
                "cls": Nanny,
                "options": {**options, "env": environment, "resources": {GPU: int(device == "cuda")}},
            }
            for number, environment in enumerate(environments)
        }
        log = logging.getLogger("distributed.nanny")
        level = log.level
        try:
            with (
                SpecCluster(scheduler=scheduler, workers=specs, silence_logs="WARNING") as cluster,
                Client(cluster, timeout=START_S) as client,
            ):
                client.wait_for_workers(num_workers, timeout=START_S)
                resources = {GPU: 1} if device == "cuda" else {}
                yield Connection(client, client.scheduler.address, num_workers, device, resources)
                # All results are here; that a process takes longer to end than the nanny waits concerns nobody.
                log.setLevel(logging.ERROR)
        finally:
            log.setLevel(level)


def _visible_gpus() -> list[str]:
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


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
        yield _check_cluster(client, address, wanted)


def _check_cluster(client: Client, address: str, wanted: str) -> Connection:
    workers = client.scheduler_info(n_workers=-1)["workers"]
    several = sorted(name for name, worker in workers.items() if worker["nthreads"] != 1)
    if several:
        raise ValueError(
            f"{len(several)} workers of {address} take several tasks at a time (first: {several[0]}), but one task uses a "
            "worker wholly; start them with `--nthreads 1`"
        )
    offering = [name for name, worker in workers.items() if worker["resources"].get(GPU, 0) >= 1]
    if wanted == "cuda" and not offering:
        raise ValueError(
            f"encode.device=cuda, but none of the {len(workers)} workers of {address} offers a GPU; start them with "
            f"`--resources {GPU}=1` and one visible GPU each, or set encode.device=cpu"
        )
    if wanted == "cpu" or not offering:
        if wanted == "auto":
            print(f"note: no worker of {address} offers a GPU (`--resources {GPU}=1`): encoding on their CPUs")
        return Connection(client, address, len(workers), "cpu", {})
    return Connection(client, address, len(offering), "cuda", {GPU: 1})


class EncodeFailedError(ValueError):
    """Some units could not be encoded; the message lists them. All others are in the cache."""


class UnitResult(NamedTuple):
    """What became of one unit; small, because the scheduler keeps it."""

    num_encoded: int
    timing: Timing
    busy: bool = False  # another encoder holds it
    unreadable: str | None = None  # why its recordings cannot be read
    failure: str | None = None  # it cannot be encoded, however often it is tried


def encode_on_workers(
    groups: Sequence[EncodingGroup], root: CacheRoot, workers: Workers
) -> tuple[Timing, int, Unreadable]:
    """Encode every unit of the groups on Dask workers, which also sum up its actions.

    A unit whose worker dies goes to another one. What cannot be encoded at all does not stop the rest.

    Args:
        groups: What is missing.
        root: Cache root, under the same path for every worker.
        workers: Where to encode.

    Returns:
        Summed timing of the workers, of which `elapsed_s` is the time that passed here; the number of encoded units; and those
        that cannot be read.

    Raises:
        EncodeFailedError: Listing the units that failed, after all others have ended.
        ValueError: No scheduler or worker answers, or none offers what the groups need.
    """
    if not groups:
        return Timing(), 0, {}
    begun, timing, num_encoded, failures = time.perf_counter(), Timing(), 0, []
    unreadable: Unreadable = {}
    with (
        workers.connect(groups[0].encode.device, groups[0].num_threads) as connection,
        ProgressBar("main", sum(group.num_bytes for group in groups)) as bar,
    ):
        units = [
            replace(group.of_units((unit,)), encode=replace(group.encode, device=connection.device))
            for group in groups
            for unit in group.units
        ]
        num_units = len(units)
        while units:
            busy = []
            for task, result in _run_round(connection, units, root, bar):
                (unit,) = task.units
                timing += result.timing
                num_encoded += result.num_encoded
                if result.busy:
                    busy.append(task)
                elif result.unreadable is not None:
                    unreadable[task.fingerprint, unit.digest] = result.unreadable
                elif result.failure is not None:
                    failures.append(f"{unit.path}: {result.failure}")
            units = busy
            if busy:
                wait_for_others(
                    root, [(unit.name, task.tokens(root, unit)) for task in busy for unit in task.units], bar.wait
                )
    if failures:
        raise EncodeFailedError(
            f"{len(failures)} of {num_units} units could not be encoded; the others are in the cache, and the same command "
            "tries only these again:" + "".join(f"\n  {failure}" for failure in sorted(failures))
        )
    return replace(timing, elapsed_s=time.perf_counter() - begun), num_encoded, unreadable


def _run_round(
    connection: Connection, units: Sequence[EncodingGroup], root: CacheRoot, bar: ProgressBar
) -> Iterator[tuple[EncodingGroup, UnitResult]]:
    """Yield every unit with what became of it, as they end."""
    from dask.distributed import as_completed

    client, topic = connection.client, f"jepa-cache-{secrets.token_hex(8)}"
    client.subscribe_topic(topic, lambda event: bar.report(*event[1]))
    futures = {}
    for number, task in enumerate(units):
        key = f"{topic}-{number}"
        future = client.submit(
            encode_unit,
            task,
            root,
            (topic, key),
            key=key,
            retries=RETRIES,
            resources=connection.resources,
        )
        futures[future] = task
    bar.say(f"{connection.num_workers} workers")
    try:
        for future in as_completed(futures):
            task = futures.pop(future)  # then it is forgotten: it need not run again if its worker dies later
            try:
                result = future.result()
            except (Exception, asyncio.CancelledError) as error:
                if client.status != "running":
                    raise ValueError(
                        f"the Dask scheduler {connection.address} is gone ({error}); the same command continues"
                    ) from error
                result = UnitResult(0, Timing(), failure=_explain(error))
            bar.end(future.key, result.timing.num_frames, 0 if result.busy else task.num_bytes)
            yield task, result
    finally:
        if client.status == "running":
            client.unsubscribe_topic(topic)
            client.cancel(list(futures))


def _explain(error: BaseException) -> str:
    from dask.distributed import KilledWorker

    if isinstance(error, KilledWorker):
        return (
            f"{error.allowed_failures + 1} workers died while encoding it, the last at {error.last_worker.address} (out of "
            "memory, or a fault in a decoder? see the worker's log)"
        )
    return f"{type(error).__name__}: {error}"


def encode_unit(task: EncodingGroup, root: CacheRoot, report_to: tuple[str, str]) -> UnitResult:
    """Encode the one unit of a group and sum up its actions; runs in a worker.

    It may run again after its result was lost with its worker: then it finds the store.

    Args:
        task: A group of one unit.
        root: Cache root.
        report_to: Topic of progress, and the name of this task there.

    Raises:
        OSError: The disk or the network failed; Dask tries again.
    """
    from dask.distributed import get_worker

    worker, reported = get_worker(), 0.0

    def report(timing: Timing, bytes_processed: int) -> None:
        nonlocal reported
        if time.monotonic() - reported > REPORT_S:
            reported = time.monotonic()
            worker.log_event(report_to[0], [report_to[1], timing.num_frames, bytes_processed])

    with _one_at_a_time:  # however many threads the worker was given
        try:
            _check_recipe(task, worker.address)
            encoder = _load_once(task.encoder, task.encode, task.num_threads)
            filled = fill_group(task, encoder, root, report)
            if filled.busy:
                return UnitResult(0, filled.timing, busy=True)
            if filled.unreadable:
                return UnitResult(0, filled.timing, unreadable=next(iter(filled.unreadable.values())))
            for unit in task.units:
                ensure_actions(root, task, unit)
        except ValueError as error:  # what a user can cause; no use trying again
            return UnitResult(0, Timing(), failure="\n    ".join([str(error), *getattr(error, "__notes__", [])]))
    return UnitResult(filled.num_encoded, filled.timing)


def _check_recipe(task: EncodingGroup, address: str) -> None:
    """Check that this worker would make the stores that the task names: it may run another version. `load_encoder` checks the weights."""
    source = name_reading(task.source.recipe, task.reading)
    recipe = token_recipe(task.encode, task.encoder.preset, source, task.encoder.identity, phase=task.phase)
    if changes := recipe_changes(task.recipe, recipe):
        raise ValueError(
            f"the worker {address} would make something else ({'; '.join(changes)}); start it from the same checkout"
        )


@functools.lru_cache(maxsize=1)
def _load_once(opened: OpenedEncoder, encode: EncodeConfig, num_threads: int) -> FrozenEncoder:
    return load_encoder(opened, encode, device=encode.device, num_threads=num_threads)
