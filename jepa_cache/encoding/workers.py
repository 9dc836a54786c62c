"""Where Dask runs stage one: processes on this machine, each with a GPU of its own, or the workers of a cluster."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from jepa_cache.encoding.filling import resolve_device

if TYPE_CHECKING:
    from dask.distributed import Client

CONNECT_S = 30
START_S = 120  # a worker imports from a cold disk
GPU = "GPU"


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
