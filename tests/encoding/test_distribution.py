"""Claims: Dask workers give the bytes that one process gives, and the death of one costs its unit another try.

A unit that kills every worker, or cannot be encoded, is named at the end without stopping the rest. What the workers cannot
do is an error before any task is sent: a GPU that none offers, no worker, no scheduler.
"""

import os
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import dask
import pytest
from dask.distributed import Scheduler, SpecCluster
from distributed.diagnostics.plugin import WorkerPlugin
from distributed.utils import get_mp_context

from jepa_cache.config.paths import default_num_threads
from jepa_cache.encoding import groups, workers
from jepa_cache.encoding.groups import scan_units
from jepa_cache.encoding.run import encode_dataset
from jepa_cache.encoding.workers import EncodeFailedError, connect
from jepa_cache.sources.vpt import VptSource
from jepa_cache.store.layout import read_store_file
from jepa_cache.store.root import CacheRoot
from tests.encoded import all_files, encode, forking_context, make_tiny_tar, tiniest_config

CONFIG = tiniest_config()


class Place(NamedTuple):
    """One scheduler with two workers, recordings, and what one process makes of them."""

    client: Any
    folder: Path
    manifest: bytes
    files: dict[str, bytes]

    def encode(self, root, folder=None, config=CONFIG):
        """Stage one on the workers."""
        folder, address = folder or self.folder, self.client.scheduler.address
        return encode_dataset(config, [str(folder)], base=folder, root=CacheRoot(root), workers=address)

    @contextmanager
    def failing(self, unit, fault):
        """Let a fault happen whenever a worker reads a unit, also one that is started later."""
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        self.client.register_plugin(Failing(unit, fault), name="fault")
        try:
            yield
        finally:
            self.client.unregister_worker_plugin("fault")


class Failing(WorkerPlugin):
    """Calls `fault` where a worker begins to read a unit."""

    def __init__(self, unit, fault):
        self.unit, self.fault = unit, fault

    def setup(self, worker):
        self.real = VptSource.iter_episodes

        def iter_episodes(source, unit):
            if unit.name == self.unit:
                self.fault()
            yield from self.real(source, unit)

        VptSource.iter_episodes = iter_episodes

    def teardown(self, worker):
        VptSource.iter_episodes = self.real


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    base = tmp_path_factory.mktemp("cluster")
    for seed, name in enumerate("abc"):
        folder = make_tiny_tar(base / "recordings", name, seed)
    expected = encode(folder, base / "cache", CONFIG).manifest.to_bytes()
    # One death is forgiven: 4 would cost these tests a minute. One task a worker: a unit that waits behind a deadly one
    # must not be counted as its victim. Forked workers do not import torch again each time that one was killed.
    settings = {
        "scheduler.allowed-failures": 1,
        "scheduler.worker-saturation": 1.0,
        "worker.multiprocessing-method": "forkserver",
    }
    with (
        pytest.MonkeyPatch.context() as patch,
        dask.config.set({f"distributed.{name}": value for name, value in settings.items()}),
    ):
        get_mp_context()  # Dask's, which sets what it preloads once
        forking_context()
        patch.setenv("XDG_STATE_HOME", str(base / "state"))
        with connect(2, "cpu", default_num_threads()) as connection:
            yield base / "state", Place(connection.client, folder, expected, all_files(base / "cache"))


@pytest.fixture
def place(cluster, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(cluster[0]))
    return cluster[1]


def test_workers_give_what_one_process_gives_bit_for_bit_and_use_their_cpus_where_none_offers_a_gpu(
    place, tmp_path, monkeypatch, capsys
):
    # Another number of threads changes the last bits of some matrix products, so no worker may choose its own.
    monkeypatch.setattr(groups, "default_num_threads", lambda: 2)
    result = place.encode(tmp_path / "cache", config=tiniest_config(device="auto"))
    assert "offers a GPU (`--resources GPU=1`): encoding on their CPUs" in capsys.readouterr().out
    assert result.manifest.to_bytes() == place.manifest
    stores = CacheRoot(tmp_path / "cache").iter_stores("tokens")
    assert {read_store_file(store).provenance["num_threads"] for store in stores} == {2}
    count = lambda: sys.modules["torch"].get_num_threads()  # noqa: E731
    client, listed = place.client, place.client.scheduler_info(n_workers=-1)["workers"]
    # Each in the thread that runs the tasks; one of the two may have had none.
    assert 2 in client.gather([client.submit(count, workers=[worker], pure=False) for worker in listed])
    assert (result.num_encoded, result.timing.num_episodes) == (3, 3)
    assert place.encode(tmp_path / "cache").num_encoded == 0


def test_what_a_dead_worker_was_at_is_done_by_another_one(place, tmp_path):
    died = tmp_path / "died"

    def die_once():
        if not died.exists():
            died.touch()
            die()

    with place.failing("b.tar", die_once):
        result = place.encode(tmp_path / "cache")
    assert died.exists() and result.manifest.to_bytes() == place.manifest
    assert all_files(tmp_path / "cache") == place.files and not list(tmp_path.rglob(".jepa-cache-*"))


def test_units_that_fail_are_listed_after_the_others_are_done(place, tmp_path):
    folder = make_tiny_tar(shutil.copytree(place.folder, tmp_path / "in"), "poison", seed=9)
    with place.failing("poison.tar", die), pytest.raises(EncodeFailedError) as caught:
        place.encode(tmp_path / "cache", folder)
    assert str(caught.value).startswith("1 of 4 units could not be encoded")
    assert f"{folder}/poison.tar: 2 workers died while encoding it" in str(caught.value)
    (folder / "poison.tar").unlink()
    again = place.encode(tmp_path / "cache", folder)
    assert again.num_encoded == 0 and again.manifest.to_bytes() == place.manifest


def test_a_gpu_whose_memory_is_full_names_the_setting_and_is_not_tried_again(place, tmp_path):
    tries = tmp_path / "tries"

    def fill():
        with tries.open("a") as file:
            file.write("x")
        raise sys.modules["torch"].OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore of it")

    words = r"b\.tar: the GPU's memory is full \(CUDA out of memory.* 2\.00 GiB\.\); lower encode\.batch_size, or start fewer workers"
    with place.failing("b.tar", fill), pytest.raises(EncodeFailedError, match=words):
        place.encode(tmp_path / "cache")
    assert tries.read_text() == "x"


def test_a_worker_that_would_make_something_else_is_refused_and_says_what(place, tmp_path, monkeypatch):
    monkeypatch.setattr(groups, "ENCODE_VERSION", 0)  # as if this command were older than the workers
    words = r"the worker tcp://.* would make something else \(encode_version: 0 -> 1\)"
    with pytest.raises(EncodeFailedError, match=words):
        place.encode(tmp_path / "cache")


def test_tasks_are_small(place):
    (group,), _ = scan_units(CONFIG, [str(place.folder)], place.folder)
    assert len(cloudpickle.dumps(group.of_units(group.units[:1]))) < 10_000


def test_workers_that_cannot_do_the_work_are_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(workers, "CONNECT_S", 1)
    monkeypatch.setattr(workers, "resolve_device", lambda wanted: "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5f")
    options = {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": ":0"}
    with SpecCluster(scheduler={"cls": Scheduler, "options": options}, silence_logs="ERROR") as idle:
        for where, device, words in (
            (0, "cpu", "the number of workers must be at least 1"),
            ("tcp://127.0.0.1:9", "cpu", r"no Dask scheduler answers at tcp://127\.0\.0\.1:9 .*dask scheduler"),
            (idle.scheduler_address, "cpu", r"has no worker after 1 s; .*dask worker tcp://.* --nthreads 1"),
        ):
            with pytest.raises(ValueError, match=words), connect(where, device, 1):
                pass


def test_each_worker_gets_one_gpu_before_it_imports_torch_and_more_of_them_share(monkeypatch):
    monkeypatch.setattr(workers, "resolve_device", lambda wanted: "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5f")
    spawn = dask.config.set({"distributed.worker.multiprocessing-method": "spawn"})
    with spawn, connect(3, "auto", 1) as connection:
        assert connection.device == "cuda"
        shown = connection.client.run(lambda: (os.environ["CUDA_VISIBLE_DEVICES"], "torch" in sys.modules))
        assert sorted(shown.values()) == [("3", False), ("3", False), ("GPU-5f", False)]
        offered = connection.client.scheduler_info(n_workers=-1)["workers"].values()
        assert [one["resources"] for one in offered] == [{"GPU": 1}] * 3


def test_workers_of_a_cluster_encode_on_gpus_where_they_offer_them_one_task_at_a_time():
    gpu, cpu = ({"nthreads": 1, "resources": resources} for resources in ({"GPU": 1}, {}))
    for wanted, chosen in (("auto", "cuda"), ("cuda", "cuda"), ("cpu", "cpu")):
        assert workers._choose_device({"one": gpu, "two": cpu}, "tcp://s", wanted) == chosen
    with pytest.raises(ValueError, match=r"1 workers of tcp://s take several tasks .*tcp://w1.*--nthreads 1"):
        workers._choose_device({"tcp://w0": cpu, "tcp://w1": cpu | {"nthreads": 4}}, "tcp://s", "cpu")
    with pytest.raises(ValueError, match=r"none of the 1 workers of tcp://s offers a GPU; .*--resources GPU=1"):
        workers._choose_device({"tcp://w0": cpu}, "tcp://s", "cuda")
