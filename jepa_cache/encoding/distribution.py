"""Stage one on several processes by Dask: one task for each unit, sent to workers here or on a cluster."""

from __future__ import annotations

import asyncio
import functools
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jepa_cache.actions import get_action_space
from jepa_cache.config.schema import EncodeConfig, EncoderPreset
from jepa_cache.encoding.claims import wait_for_others
from jepa_cache.encoding.filling import EncodeTask, Unreadable, ensure_actions, fill_part, load_encoder
from jepa_cache.encoding.pipeline import Timing
from jepa_cache.encoding.progress import ProgressBar
from jepa_cache.encoding.reading import name_reading
from jepa_cache.encoding.recipes import token_recipe
from jepa_cache.encoding.workers import Connection, Workers
from jepa_cache.store.recipe import recipe_changes
from jepa_cache.store.root import CacheRoot

if TYPE_CHECKING:
    from jepa_cache.encoder.frozen import FrozenEncoder

RETRIES = 2  # after an error that is not the input's: the disk, the network, a GPU out of memory
REPORT_S = 1.0  # between two reports of a task
_one_at_a_time = threading.Lock()


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
    tasks: Sequence[EncodeTask], root: CacheRoot, workers: Workers, action_space: str
) -> tuple[Timing, int, Unreadable]:
    """Encode every unit of the tasks on Dask workers, which also aggregate its actions.

    A unit whose worker dies goes to another one. What cannot be encoded at all does not stop the rest.

    Args:
        tasks: What is missing.
        root: Cache root, under the same path for every worker.
        workers: Where to encode.
        action_space: Its name.

    Returns:
        Summed timing of the workers, of which `elapsed_s` is the time that passed here; the number of encoded units; and those
        that cannot be read.

    Raises:
        EncodeFailedError: Listing the units that failed, after all others are through.
        ValueError: No scheduler or worker answers, or none offers what the tasks need.
    """
    if not tasks:
        return Timing(), 0, {}
    begun, timing, num_encoded, failures = time.perf_counter(), Timing(), 0, []
    unreadable: Unreadable = {}
    with (
        workers.connect(tasks[0].encode.device, tasks[0].num_threads) as connection,
        ProgressBar("main", sum(task.num_bytes for task in tasks)) as bar,
    ):
        units = [
            replace(
                task,
                encode=replace(task.encode, device=connection.device),
                part=replace(task.part, units=(unit,)),
            )
            for task in tasks
            for unit in task.part.units
        ]
        num_units = len(units)
        while units:
            busy = []
            for task, result in _run_round(connection, units, root, action_space, bar):
                timing += result.timing
                num_encoded += result.num_encoded
                if result.busy:
                    busy.append(task)
                elif result.unreadable is not None:
                    unreadable[task.part.tokens, task.part.units[0][1]] = result.unreadable
                elif result.failure is not None:
                    failures.append(f"{task.part.units[0][0].path}: {result.failure}")
            units = busy
            if busy:
                wait_for_others(root, [place for task in busy for place in task.places(root)], bar.wait)
    if failures:
        raise EncodeFailedError(
            f"{len(failures)} of {num_units} units could not be encoded; the others are in the cache, and the same command "
            "tries only these again:" + "".join(f"\n  {failure}" for failure in sorted(failures))
        )
    return replace(timing, elapsed_s=time.perf_counter() - begun), num_encoded, unreadable


def _run_round(
    connection: Connection, units: Sequence[EncodeTask], root: CacheRoot, action_space: str, bar: ProgressBar
) -> Iterator[tuple[EncodeTask, UnitResult]]:
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
            action_space,
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


def encode_unit(task: EncodeTask, root: CacheRoot, action_space: str, report_to: tuple[str, str]) -> UnitResult:
    """Encode the one unit of a task and aggregate its actions; runs in a worker.

    It may run again after its result was lost with its worker: then it finds the store.

    Args:
        task: Of one unit.
        root: Cache root.
        action_space: Its name.
        report_to: Topic of progress, and the name of this task there.

    Raises:
        OSError: The disk or the network failed; Dask tries again.
    """
    from dask.distributed import get_worker

    worker, reported = get_worker(), 0.0

    def report(timing: Timing, bytes_through: int) -> None:
        nonlocal reported
        if time.monotonic() - reported > REPORT_S:
            reported = time.monotonic()
            worker.log_event(report_to[0], [report_to[1], timing.num_frames, bytes_through])

    with _one_at_a_time:  # however many threads the worker was given
        try:
            _check_recipe(task, worker.address)
            encoder = _load_once(task.encoder, task.weights, task.identity, task.encode, task.num_threads)
            filled = fill_part(task, encoder, root, report)
            if filled.busy:
                return UnitResult(0, filled.timing, busy=True)
            if filled.unreadable:
                return UnitResult(0, filled.timing, unreadable=next(iter(filled.unreadable.values())))
            for unit, digest in task.part.units:
                ensure_actions(root, task.part, get_action_space(action_space), unit, digest)
        except ValueError as error:  # what a user can cause; no use trying again
            return UnitResult(0, Timing(), failure="\n    ".join([str(error), *getattr(error, "__notes__", [])]))
    return UnitResult(filled.num_encoded, filled.timing)


def _check_recipe(task: EncodeTask, address: str) -> None:
    """Check that this worker would make what was asked for: it may run another version. `load_encoder` checks the weights."""
    part = task.part
    source = name_reading(part.source.recipe, part.reading)
    recipe = token_recipe(task.encode, task.encoder, source, task.identity, phase=part.phase)
    if changes := recipe_changes(part.recipe, recipe):
        raise ValueError(
            f"the worker {address} would make something else ({'; '.join(changes)}); start it from the same checkout"
        )


@functools.lru_cache(maxsize=1)
def _load_once(
    preset: EncoderPreset, weights: Path | None, identity: str, encode: EncodeConfig, num_threads: int
) -> FrozenEncoder:
    return load_encoder(preset, weights, identity, encode, device=encode.device, num_threads=num_threads)
