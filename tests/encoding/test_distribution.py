"""Claims: Dask workers give the bytes that one process gives, and the death of one costs its unit another try.

A unit that kills every worker, or cannot be encoded, is named at the end without stopping the rest. What the workers cannot
do is an error before any task is sent: a GPU that none offers, no worker, no scheduler.
"""

import os
import shutil
import signal
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import dask
import pytest
from distributed.diagnostics.plugin import WorkerPlugin
from distributed.utils import get_mp_context

from jepa_cache.config.paths import default_num_threads
from jepa_cache.encoding import groups, run, workers
from jepa_cache.encoding.run import encode_dataset
from jepa_cache.encoding.workers import EncodeFailedError, connect
from jepa_cache.store.layout import read_store_file
from jepa_cache.store.root import CacheRoot
from tests.encoded import all_files, encode, forking_context, make_tiny_tar, tiniest_config

CONFIG = tiniest_config()


class Place(NamedTuple):
    """One scheduler with two workers, recordings, and what one process makes of them."""

    address: str
    client: Any
    folder: Path
    manifest: bytes
    files: dict[str, bytes]

    def encode(self, root, folder=None, config=CONFIG):
        """Stage one on the workers."""
        folder = folder or self.folder
        return encode_dataset(config, [str(folder)], base=folder, root=CacheRoot(root), workers=self.address)

    @contextmanager
    def plugged(self, plugin):
        """Let something happen in every worker, also in those that are started later."""
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        self.client.register_plugin(plugin, name="fault")
        try:
            yield
        finally:
            self.client.unregister_worker_plugin("fault")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    base = tmp_path_factory.mktemp("cluster")
    for seed, name in enumerate("abc"):
        folder = make_tiny_tar(base / "recordings", name, seed)
    expected = encode(folder, base / "cache", CONFIG).manifest.to_bytes()
    # One death is forgiven: 4 would cost these tests a minute. One task a worker: a unit that waits behind a deadly one
    # must not be counted as its victim.
    # Forked workers do not import torch again each time that one was killed.
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
            files = all_files(base / "cache")
            yield base / "state", Place(connection.address, connection.client, folder, expected, files)


@pytest.fixture
def place(cluster, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(cluster[0]))
    return cluster[1]


class Deadly(WorkerPlugin):
    """Kills the worker that is given a unit, once or always."""

    def __init__(self, unit, marker=None):
        self.unit, self.marker = unit, marker

    def setup(self, worker):
        real, plugin = workers._check_recipe, self

        def check_recipe(task, address):
            if task.units[0].name == plugin.unit and not (plugin.marker and plugin.marker.exists()):
                if plugin.marker:
                    plugin.marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            real(task, address)

        workers._check_recipe = check_recipe


class Unreadable(WorkerPlugin):
    """Lets the reading of a unit break off in every worker, until it is taken out."""

    def __init__(self, unit):
        self.unit = unit

    def setup(self, worker):
        from jepa_cache.sources.vpt import VptSource

        real, plugin = VptSource.iter_episodes, self
        self.real = real

        def iter_episodes(source, unit):
            if unit.name == plugin.unit:
                raise OSError(5, "the disk is gone")
            yield from real(source, unit)

        VptSource.iter_episodes = iter_episodes

    def teardown(self, worker):
        from jepa_cache.sources.vpt import VptSource

        VptSource.iter_episodes = self.real


def test_workers_give_what_one_process_gives_bit_for_bit_and_use_their_cpus_where_none_offers_a_gpu(
    place, tmp_path, capsys
):
    result = place.encode(tmp_path / "cache", config=tiniest_config(device="auto"))
    assert "offers a GPU (`--resources GPU=1`): encoding on their CPUs" in capsys.readouterr().out
    assert result.manifest.to_bytes() == place.manifest
    assert all_files(tmp_path / "cache") == place.files and not list(tmp_path.rglob(".jepa-cache-*"))
    assert (result.num_encoded, result.timing.num_episodes) == (3, 3)
    assert place.encode(tmp_path / "cache").num_encoded == 0


def test_the_number_of_torch_threads_is_that_of_the_process_that_sends_the_tasks(place, tmp_path, monkeypatch):
    # Another number of threads changes the last bits of some matrix products, so no worker may choose its own.
    monkeypatch.setattr(groups, "default_num_threads", lambda: 2)
    manifest = place.encode(tmp_path / "cache").manifest
    store = CacheRoot(tmp_path / "cache").tokens(manifest.fingerprint, manifest.entries[0].unit_digest)
    assert read_store_file(store).provenance["num_threads"] == 2
    count = lambda: sys.modules["torch"].get_num_threads()  # noqa: E731
    client, listed = place.client, place.client.scheduler_info(n_workers=-1)["workers"]
    # Each in the thread that runs the tasks; one of the two may have had none.
    assert 2 in client.gather([client.submit(count, workers=[worker], pure=False) for worker in listed])


def test_what_a_dead_worker_was_at_is_done_by_another_one(place, tmp_path):
    with place.plugged(Deadly("b.tar", tmp_path / "died")):
        result = place.encode(tmp_path / "cache")
    assert (tmp_path / "died").exists()
    assert result.manifest.to_bytes() == place.manifest and all_files(tmp_path / "cache") == place.files
    assert not list(tmp_path.rglob(".jepa-cache-*"))


def test_units_that_fail_are_listed_after_the_others_are_done(place, tmp_path):
    folder = make_tiny_tar(shutil.copytree(place.folder, tmp_path / "in"), "poison", seed=9)
    with place.plugged(Deadly("poison.tar")), pytest.raises(EncodeFailedError) as caught:
        place.encode(tmp_path / "cache", folder)
    assert str(caught.value).startswith("1 of 4 units could not be encoded")
    assert f"{folder}/poison.tar: 2 workers died while encoding it" in str(caught.value)
    (folder / "poison.tar").unlink()
    again = place.encode(tmp_path / "cache", folder)
    assert again.num_encoded == 0 and again.manifest.to_bytes() == place.manifest


def test_units_that_workers_cannot_read_are_skipped_as_one_process_skips_them(place, tmp_path):
    folder, config = shutil.copytree(place.folder, tmp_path / "in"), tiniest_config(max_skipped_share=0.5)
    (folder / "page.tar").write_bytes(b"<html>404</html>")
    with place.plugged(Unreadable("b.tar")):
        result = place.encode(tmp_path / "cache", folder, config)
    assert result.num_encoded == 3
    skipped = {recording["key"]: recording["reason"] for recording in result.manifest.skipped}
    assert "HTML page" in skipped["page.tar"] and skipped["b.tar"] == "it cannot be read: the disk is gone"
    assert place.encode(tmp_path / "cache", folder, config).num_encoded == 1


def test_a_worker_that_would_make_something_else_is_refused_and_says_what(place, tmp_path, monkeypatch):
    monkeypatch.setattr(groups, "ENCODE_VERSION", 0)  # as if this command were older than the workers
    words = r"the worker tcp://.* would make something else \(encode_version: 0 -> 1\)"
    with pytest.raises(EncodeFailedError, match=words):
        place.encode(tmp_path / "cache")


def test_a_unit_that_another_encoder_holds_is_waited_for_and_not_made_twice(place, tmp_path, monkeypatch):
    root = CacheRoot(tmp_path / "cache")
    manifest = place.encode(root.path).manifest
    store = root.tokens(manifest.fingerprint, manifest.entries[0].unit_digest)
    kept, claim, waited = store.rename(tmp_path / "kept"), root.claim(store), []

    def finish(_, groups, on_wait):
        waited.extend(groups)
        kept.rename(store)
        claim.release()

    monkeypatch.setattr(run, "wait_for_others", finish)
    result = place.encode(root.path)
    assert len(waited) == 1 and result.num_encoded == 0 and result.manifest.to_bytes() == place.manifest


def test_tasks_are_small(place, tmp_path, monkeypatch):
    sent = []

    def send(groups, *_):
        sent.extend(group.of_units((unit,)) for group in groups for unit in group.units)
        raise ValueError("nothing is sent")

    monkeypatch.setattr(run, "encode_on_workers", send)
    monkeypatch.setattr(run, "connect", lambda *_: nullcontext("a connection"))
    with pytest.raises(ValueError, match="nothing is sent"):
        place.encode(tmp_path / "cache")
    assert len(sent) == 3 and all(len(cloudpickle.dumps(task)) < 10_000 for task in sent)


@pytest.mark.parametrize(
    ("where", "device", "words"),
    [
        (0, "cpu", "the number of workers must be at least 1"),
        (3, "auto", "3 workers need a GPU each, but this machine shows 2; use --workers 2"),
        (1, "cuda:1", r"names one GPU.*encode\.device=cuda"),
        ("tcp://127.0.0.1:9", "cpu", r"no Dask scheduler answers at tcp://127\.0\.0\.1:9 .*dask scheduler"),
        ("idle", "cpu", r"has no worker after 1 s; .*dask worker tcp://.* --nthreads 1"),
        ("busy", "cuda", r"none of the 2 workers of tcp://.* offers a GPU; .*--resources GPU=1"),
    ],
)
def test_workers_that_cannot_do_the_work_are_refused_with_the_way_out(request, monkeypatch, where, device, words):
    from dask.distributed import Scheduler, SpecCluster

    monkeypatch.setattr(workers, "CONNECT_S", 1)
    monkeypatch.setattr(workers, "resolve_device", lambda wanted: "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5f")
    options = {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": ":0"}
    idle = SpecCluster(scheduler={"cls": Scheduler, "options": options}, silence_logs="ERROR")
    with idle if where == "idle" else nullcontext():
        if where == "busy":
            cluster = request.getfixturevalue("place")
            cluster.client.wait_for_workers(2)
            where = cluster.address
        where = idle.scheduler_address if where == "idle" else where
        with pytest.raises(ValueError, match=words), connect(where, device, 1):
            pass


def test_each_worker_gets_a_gpu_of_its_own_before_it_imports_torch(monkeypatch):
    monkeypatch.setattr(workers, "resolve_device", lambda wanted: "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5f")
    spawn = dask.config.set({"distributed.worker.multiprocessing-method": "spawn"})
    with spawn, connect(2, "auto", 1) as connection:
        assert (connection.device, connection.resources) == ("cuda", {"GPU": 1})
        shown = connection.client.run(lambda: (os.environ["CUDA_VISIBLE_DEVICES"], "torch" in sys.modules))
        assert sorted(shown.values()) == [("3", False), ("GPU-5f", False)]
        offered = connection.client.scheduler_info(n_workers=-1)["workers"].values()
        assert [one["resources"] for one in offered] == [{"GPU": 1}, {"GPU": 1}]


class FakeClient:
    """A scheduler's list of workers."""

    def __init__(self, *listed):
        self.workers = {f"tcp://w{number}": worker for number, worker in enumerate(listed)}

    def scheduler_info(self, n_workers):
        return {"workers": self.workers}


def test_tasks_take_a_gpu_each_where_workers_offer_them():
    gpu, cpu = ({"nthreads": 1, "resources": resources} for resources in ({"GPU": 1}, {}))
    for wanted, chosen in (("auto", "cuda"), ("cuda", "cuda"), ("cpu", "cpu")):
        connection = workers._check_cluster(FakeClient(gpu, cpu), "tcp://s", wanted)
        on_gpu = chosen == "cuda"
        assert (connection.device, connection.num_workers) == (chosen, 1 if on_gpu else 2)
        assert connection.resources == ({"GPU": 1} if on_gpu else {})
    with pytest.raises(ValueError, match=r"1 workers of tcp://s take several tasks .*tcp://w1.*--nthreads 1"):
        workers._check_cluster(FakeClient(cpu, cpu | {"nthreads": 4}), "tcp://s", "cpu")
