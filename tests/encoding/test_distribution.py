"""Claims: Dask workers give the bytes that one process gives, and the death of one costs its unit another try.

A unit that kills every worker, or cannot be encoded, is named at the end without stopping the rest. What the workers cannot do is an error before any task is sent: a GPU that none offers, no worker, no scheduler.
"""

import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import cloudpickle
import dask
import pytest
from distributed.diagnostics.plugin import WorkerPlugin

from jepa_cache.config.paths import default_num_threads
from jepa_cache.encoding import groups, run, workers
from jepa_cache.encoding.run import encode_dataset
from jepa_cache.encoding.workers import EncodeFailedError, connect
from jepa_cache.store.layout import read_store_file
from jepa_cache.store.root import CacheRoot
from tests.encoded import all_files, encode, make_tiny_tar, tiniest_config
from tests.encoding.test_weights_in_use import save_weights

CONFIG = tiniest_config()


class Place(NamedTuple):
    """Where the tests of this file work: one scheduler with two workers, recordings, and what one process makes of them."""

    address: str
    client: object
    state: object
    folder: object
    manifest: bytes
    files: dict


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    base = tmp_path_factory.mktemp("cluster")
    folder = base / "recordings"
    for seed, name in enumerate("abc"):
        make_tiny_tar(folder, name, seed)
    expected = encode(folder, base / "cache", CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(base / "state"))
        # One death is forgiven: 4 would cost these tests a minute.
        with (
            # One task a worker: a unit that waits behind a deadly one must not be counted as its victim.
            dask.config.set(
                {"distributed.scheduler.allowed-failures": 1, "distributed.scheduler.worker-saturation": 1.0}
            ),
            connect(2, "cpu", default_num_threads()) as connection,
        ):
            manifest = expected.manifest.to_bytes()
            yield Place(
                connection.address, connection.client, base / "state", folder, manifest, all_files(base / "cache")
            )


@pytest.fixture
def encode_there(place, monkeypatch):
    """Stage one on the workers."""
    monkeypatch.setenv("XDG_STATE_HOME", str(place.state))

    def encode_there(folder, root, config=CONFIG):
        return encode_dataset(config, [str(folder)], base=folder, root=CacheRoot(root), workers=place.address)

    return encode_there


def plug(client, plugin):
    """Let something happen in every worker, also in those that are started later."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    client.register_plugin(plugin, name="fault")


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
    place, encode_there, tmp_path, capsys
):
    result = encode_there(place.folder, tmp_path / "cache", tiniest_config(device="auto"))
    assert "offers a GPU (`--resources GPU=1`): encoding on their CPUs" in capsys.readouterr().out
    assert result.manifest.to_bytes() == place.manifest
    assert all_files(tmp_path / "cache") == place.files and not list(tmp_path.rglob(".jepa-cache-*"))
    assert (result.num_encoded, result.timing.num_episodes) == (3, 3)
    assert encode_there(place.folder, tmp_path / "cache").num_encoded == 0


def test_the_number_of_torch_threads_is_that_of_the_process_that_sends_the_tasks(
    place, encode_there, tmp_path, monkeypatch
):
    # Another number of threads changes the last bits of some matrix products, so no worker may choose its own.
    monkeypatch.setattr(groups, "default_num_threads", lambda: 2)
    result = encode_there(place.folder, tmp_path / "cache")
    digest = result.manifest.entries[0].unit_digest
    store = read_store_file(CacheRoot(tmp_path / "cache").tokens(result.manifest.fingerprint, digest))
    assert store.provenance["num_threads"] == 2
    assert set(place.client.run(lambda: sys.modules["torch"].get_num_threads()).values()) == {2}
    here = encode(place.folder, tmp_path / "here", CONFIG)
    assert result.manifest.to_bytes() == here.manifest.to_bytes()


def test_what_a_dead_worker_was_at_is_done_by_another_one(place, encode_there, tmp_path):
    plug(place.client, Deadly("b.tar", tmp_path / "died"))
    try:
        result = encode_there(place.folder, tmp_path / "cache")
    finally:
        place.client.unregister_worker_plugin("fault")
    assert (tmp_path / "died").exists()
    assert result.manifest.to_bytes() == place.manifest and all_files(tmp_path / "cache") == place.files
    assert not list(tmp_path.rglob(".jepa-cache-*"))


def test_units_that_fail_are_listed_after_the_others_are_done(place, encode_there, tmp_path):
    for name in "abc":
        (tmp_path / f"in/{name}.tar").parent.mkdir(exist_ok=True)
        (tmp_path / f"in/{name}.tar").write_bytes((place.folder / f"{name}.tar").read_bytes())
    make_tiny_tar(tmp_path / "in", "poison", seed=9)
    plug(place.client, Deadly("poison.tar"))
    try:
        with pytest.raises(EncodeFailedError) as caught:
            encode_there(tmp_path / "in", tmp_path / "cache")
    finally:
        place.client.unregister_worker_plugin("fault")
    message = str(caught.value)
    assert message.startswith("1 of 4 units could not be encoded")
    assert f"{tmp_path}/in/poison.tar: 2 workers died while encoding it" in message
    assert len(list((tmp_path / "cache").glob("tokens/*/[!.]*.zarr"))) == 3
    (tmp_path / "in/poison.tar").unlink()
    again = encode_there(tmp_path / "in", tmp_path / "cache")
    assert again.num_encoded == 0 and again.manifest.to_bytes() == place.manifest


def test_units_that_workers_cannot_read_are_skipped_as_one_process_skips_them(place, encode_there, tmp_path):
    for name in "abc":
        (tmp_path / f"in/{name}.tar").parent.mkdir(exist_ok=True)
        (tmp_path / f"in/{name}.tar").write_bytes((place.folder / f"{name}.tar").read_bytes())
    (tmp_path / "in/page.tar").write_bytes(b"<html>404</html>")
    plug(place.client, Unreadable("b.tar"))
    config = tiniest_config(max_skipped_share=0.5)
    try:
        result = encode_there(tmp_path / "in", tmp_path / "cache", config)
    finally:
        place.client.unregister_worker_plugin("fault")
    assert result.num_encoded == 3
    skipped = {recording["key"]: recording["reason"] for recording in result.manifest.skipped}
    assert "HTML page" in skipped["page.tar"] and skipped["b.tar"] == "it cannot be read: the disk is gone"
    assert encode_there(tmp_path / "in", tmp_path / "cache", config).num_encoded == 1


def test_a_gpu_that_no_worker_offers_is_an_error_at_once(place, encode_there, tmp_path):
    with pytest.raises(ValueError, match=r"none of the \d workers of tcp://.* offers a GPU; .*--resources GPU=1"):
        encode_there(place.folder, tmp_path / "cache", tiniest_config(device="cuda"))
    assert not (tmp_path / "cache/tokens").exists()


def test_a_worker_that_would_make_something_else_is_refused_and_says_what(place, encode_there, tmp_path, monkeypatch):
    monkeypatch.setattr(groups, "ENCODE_VERSION", 0)  # as if this command were older than the workers
    with pytest.raises(
        EncodeFailedError, match=r"the worker tcp://.* would make something else \(encode_version: 0 -> 1\)"
    ):
        encode_there(place.folder, tmp_path / "cache")


def test_weights_that_are_replaced_before_a_worker_loads_them_are_refused_by_name(place, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(place.state))
    config, others = (save_weights(tmp_path / f"{seed}.pt", "pt", seed) for seed in (1, 2))

    def replace(_):
        Path(others.encoder.weights).rename(config.encoder.weights)

    given = {"base": place.folder, "root": CacheRoot(tmp_path / "cache"), "workers": place.address}
    with (
        monkeypatch.context() as patch,
        pytest.raises(EncodeFailedError, match=r"1\.pt are not those that the stores are named by"),
    ):
        patch.setattr(run, "check_controls", replace)  # after the weights were hashed
        encode_dataset(config, [str(place.folder)], **given)
    assert not [path for path in all_files(tmp_path / "cache") if path.startswith("tokens/")]
    assert encode_dataset(config, [str(place.folder)], **given).num_encoded == 3


def test_a_unit_that_another_encoder_holds_is_waited_for_and_not_made_twice(place, encode_there, tmp_path, monkeypatch):
    root = CacheRoot(tmp_path / "cache")
    first = encode_there(place.folder, tmp_path / "cache")
    store = root.tokens(first.manifest.fingerprint, first.manifest.entries[0].unit_digest)
    kept = store.rename(tmp_path / "kept")
    claim = root.claim(store)
    waited = []

    def finish(bar, unit):
        waited.append(unit)
        kept.rename(store)
        claim.release()

    monkeypatch.setattr(run.ProgressBar, "wait", finish)
    result = encode_there(place.folder, tmp_path / "cache")
    assert len(waited) == 1 and result.num_encoded == 0
    assert result.manifest.to_bytes() == place.manifest


def test_no_scheduler_and_no_worker_are_errors_that_say_what_to_start(monkeypatch):
    from dask.distributed import Scheduler, SpecCluster

    monkeypatch.setattr(workers, "CONNECT_S", 1)
    with (
        pytest.raises(ValueError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9 .*dask scheduler"),
        connect("tcp://127.0.0.1:9", "cpu", 1),
    ):
        pass
    options = {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": ":0"}
    with (
        SpecCluster(scheduler={"cls": Scheduler, "options": options}, silence_logs="ERROR") as cluster,
        pytest.raises(ValueError, match=r"has no worker after 1 s; .*dask worker tcp://.* --nthreads 1"),
        connect(cluster.scheduler_address, "cpu", 1),
    ):
        pass


class FakeClient:
    """A scheduler's list of workers."""

    def __init__(self, *listed):
        self.workers = {f"tcp://w{number}": worker for number, worker in enumerate(listed)}

    def scheduler_info(self, n_workers):
        return {"workers": self.workers}


def worker(nthreads=1, **resources):
    return {"nthreads": nthreads, "resources": resources}


def test_tasks_take_a_gpu_each_where_workers_offer_them(capsys):
    for wanted in ("auto", "cuda"):
        connection = workers._check_cluster(FakeClient(worker(GPU=1), worker()), "tcp://s", wanted)
        assert (connection.device, connection.resources, connection.num_workers) == ("cuda", {"GPU": 1}, 1)
    connection = workers._check_cluster(FakeClient(worker(GPU=1), worker()), "tcp://s", "cpu")
    assert (connection.device, connection.resources, connection.num_workers) == ("cpu", {}, 2)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match=r"1 workers of tcp://s take several tasks .*tcp://w1.*--nthreads 1"):
        workers._check_cluster(FakeClient(worker(), worker(4)), "tcp://s", "cpu")


def test_at_least_one_worker_is_needed():
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="the number of workers must be at least 1"):
            connect(wrong, "cpu", 1)


def test_more_workers_than_gpus_are_refused_and_each_gets_one_of_its_own(monkeypatch):
    monkeypatch.setattr(workers, "resolve_device", lambda wanted: "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5f")
    with (
        pytest.raises(ValueError, match="3 workers need a GPU each, but this machine shows 2; use --workers 2"),
        connect(3, "auto", 1),
    ):
        pass
    with connect(2, "auto", 1) as connection:
        assert (connection.device, connection.resources) == ("cuda", {"GPU": 1})
        shown = connection.client.run(lambda: (os.environ["CUDA_VISIBLE_DEVICES"], "torch" in sys.modules))
        assert sorted(shown.values()) == [("3", False), ("GPU-5f", False)]
        offered = connection.client.scheduler_info(n_workers=-1)["workers"].values()
        assert [one["resources"] for one in offered] == [{"GPU": 1}, {"GPU": 1}]
    with (
        pytest.raises(ValueError, match=r"names one GPU.*encode\.device=cuda"),
        connect(1, "cuda:1", 1),
    ):
        pass


def test_tasks_are_small(place, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(place.state))
    sent = []

    def send(groups, *_):
        sent.extend(group.of_units((unit,)) for group in groups for unit in group.units)
        raise ValueError("nothing is sent")

    monkeypatch.setattr(run, "encode_on_workers", send)
    monkeypatch.setattr(run, "connect", lambda *_: nullcontext("a connection"))
    root = CacheRoot(tmp_path / "cache")
    with pytest.raises(ValueError, match="nothing is sent"):
        encode_dataset(CONFIG, [str(place.folder)], base=place.folder, root=root, workers=1)
    assert sum(len(task.units) for task in sent) == 3
    assert all(len(cloudpickle.dumps(task)) < 10_000 for task in sent)
