"""Claims: a root in a bucket gives every machine the same bytes as a folder does; it is whole or absent at every moment.

Two caches of this machine stand for two machines: they share nothing but the bucket.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from jepa_cache.store import blocks, commits, layout, mirror, objects, records
from jepa_cache.store.controls import ControlsWriter, iter_controls, read_actions, write_actions
from jepa_cache.store.damage import StoreDamagedError
from jepa_cache.store.mirror import open_mirror
from jepa_cache.store.objects import Bucket
from jepa_cache.store.reader import ArrayReader, TokenReader, read_table
from jepa_cache.store.root import CacheRoot, resolve_cache_root
from jepa_cache.store.verify import check_store, read_store_file
from jepa_cache.store.writer import TokenWriter, table
from tests.store.s3_server import Fault

N, D, NUM_STEPS = 3, 8, 520
TOKENS = np.random.default_rng(0).standard_normal((NUM_STEPS, N, D)).astype(np.float16)
UNIT, RECIPE = "5" * 64, "f" * 32
CHUNKS = "tokens/c/0/0/0"


def write_tokens(store, tokens=TOKENS):
    columns = {field.name: np.arange(len(tokens)) % 2 for field in layout.STEPS_SCHEMA}
    columns["gui"] = np.zeros(len(tokens), bool)
    segments = {"segment": [0], "episode": ["a"], "start": [0], "stop": [len(tokens)], "step_hz": [5.0]}
    with TokenWriter(store, num_tokens=N, width=D) as writer:
        writer.append(tokens)
        writer.publish(
            table(layout.STEPS_SCHEMA, columns),
            table(layout.SEGMENTS_SCHEMA, segments),
            {"recipe": {}},
            {"device": "cpu"},
        )


def publish_tokens(root):
    store = root.tokens(RECIPE, UNIT)
    write_tokens(store)
    root.publish(store)
    return store


def read_all(store):
    out = np.empty_like(TOKENS)
    with TokenReader(store) as reader:
        reader.read(0, out)
    return out


def keys_of(root):
    return set(root.bucket.list(""))


def files_below(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_what_one_machine_publishes_another_reads_bit_for_bit(machines, tmp_path):
    publish_tokens(machines("a"))
    folder = CacheRoot(tmp_path / "folder")
    write_tokens(folder.tokens(RECIPE, UNIT))
    root = machines("b")
    store, local = root.tokens(RECIPE, UNIT), folder.tokens(RECIPE, UNIT)
    assert root.fetch(store)
    assert np.array_equal(read_all(store), TOKENS)
    assert check_store(store, read_data=True) == check_store(local, read_data=True)
    for name in (layout.STEPS_FILE, layout.SEGMENTS_FILE):
        assert read_table(store, name).equals(read_table(local, name))
    assert not list(store.glob("tokens/c/**/*")), "token chunks are not fetched whole"
    assert files_below(root.path) == {name for name in files_below(folder.path) if "/tokens/c/" not in name}


def test_controls_actions_and_manifests_travel_too(machines):
    here, there = machines("a"), machines("b")
    actions, states = np.ones((4, 2), np.float32), np.zeros((4, 3), np.float32)
    store, controls, manifest = (
        lambda root: root.actions(RECIPE, UNIT),
        lambda root: root.controls(RECIPE, UNIT),
        lambda root: root.manifest(RECIPE),
    )
    write_actions(store(here), actions, states, {"excluded": {}})
    with ControlsWriter(controls(here)) as writer:
        writer.append("a", {"dx": np.arange(5)})
    manifest(here).parent.mkdir(parents=True)
    manifest(here).write_bytes(b"{}")
    for place in (store, controls, manifest):
        assert not there.fetch(place(there))
        here.publish(place(here))
        assert there.fetch(place(there))
    assert all(np.array_equal(*pair) for pair in zip(read_actions(store(there)), (actions, states), strict=True))
    ((episode, columns),) = iter_controls(controls(there))
    assert episode == "a" and np.array_equal(columns["dx"], np.arange(5))
    assert manifest(there).read_bytes() == b"{}"


def test_another_zarr_reader_reads_the_store_in_the_bucket(machines):
    zarr = pytest.importorskip("zarr")
    from zarr.storage import ObjectStore

    root = machines("a")
    store = publish_tokens(root)
    prefix = f"{root.bucket.url}/{records.read_record(store).attempt}"
    bucket = objects.obstore().store.from_url(prefix, client_options={"allow_http": True})
    group = zarr.open_group(ObjectStore(bucket, read_only=True), mode="r")
    assert np.array_equal(group["tokens"][...], TOKENS)


def test_reading_survives_dropped_connections(server, machines, monkeypatch):
    publish_tokens(machines("a"))
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 10_000)
    root = machines("b")
    for pattern, kind in (("GET .*store.json", "deaf"), ("GET .*parquet", "cut"), ("GET .*/c/0/0/0", "refuse")):
        server.faults.append(Fault(pattern, kind, 10, times=3))
    server.faults.append(Fault("GET .*/c/1/0/0", "cut", 10, times=3))
    assert root.fetch(root.tokens(RECIPE, UNIT))
    assert np.array_equal(read_all(root.tokens(RECIPE, UNIT)), TOKENS)


def test_publishing_survives_dropped_connections_even_of_the_commit(server, machines):
    root = machines("a")
    root.fetch(root.tokens(RECIPE, UNIT))
    server.faults += [Fault("PUT .*store.json", "refuse", times=3), Fault("PUT .*/c/0/0/0", "deaf", times=2)]
    server.faults.append(Fault("PUT .*commit.json", "deaf"))  # the repeated request is told that there is one
    store = publish_tokens(root)
    attempt = records.read_record(store).attempt
    assert all(key.startswith(f"{attempt}/") for key in keys_of(root) if ".attempt-" in key)
    assert machines("b").fetch(machines("b").tokens(RECIPE, UNIT))


KILLED = """
import os, sys
from pathlib import Path
from jepa_cache.store import objects
from jepa_cache.store.mirror import open_mirror

def run(root, place, number):
    library, count = objects.obstore, [0]
    class Library:
        def __getattr__(self, name):
            function = getattr(library(), name)
            if name not in ("put", "get", "get_ranges", "list", "delete"):
                return function
            def call(*arguments, **options):
                for kept in (None, "result"):  # before the request, and after it
                    if kept:
                        kept = function(*arguments, **options)
                        kept = list(kept) if name == "list" else kept
                    if count[0] == number:
                        os._exit(9)
                    count[0] += 1
                return kept
            return call
    objects.obstore = Library
    root.publish(place)

url, name, first = sys.argv[1:]
number, status = int(first), 9
while status == 9:
    root = open_mirror(f"{url}-{number}")
    child = os.fork()
    if child == 0:
        run(root, root.path / name, number)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    number += 1
print(number, status)
"""
MOST_KILLS = 60


def test_a_publisher_killed_at_any_request_leaves_a_whole_store_or_none_and_the_next_run_finishes(
    server, machines, monkeypatch, tmp_path
):
    """Enumerated: before and after every request of a publication, each in a fresh prefix; then the same machine goes on."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.direct_url)
    folder = CacheRoot(tmp_path / "folder")
    store = folder.tokens(RECIPE, UNIT)
    write_tokens(store)
    name, url = store.relative_to(folder.path), machines("a").name
    for number in range(MOST_KILLS):
        place = open_mirror(f"{url}-{number}").path / name
        place.parent.mkdir(parents=True)
        shutil.copytree(store, place, copy_function=os.link)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", KILLED, url, str(name), "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    num_kills, status = map(int, done.stdout.split())
    assert status == 0 and 2 * len(files_below(store)) < num_kills < MOST_KILLS, done.stderr
    whole = 0
    for number in range(num_kills):
        machines("b")
        other = open_mirror(f"{url}-{number}")
        if other.fetch(other.path / name):
            whole += 1
            assert np.array_equal(read_all(other.path / name), TOKENS)
        machines("a")
        again = open_mirror(f"{url}-{number}")
        assert again.fetch(again.path / name), "what was finished is uploaded by the next run"
        assert np.array_equal(read_all(again.path / name), TOKENS)
        assert not list((again.path / name).glob("tokens/c/**/*")), "what is in the bucket is dropped here"
        commit = records.read_record(again.path / name)
        assert {key.split("/")[2] for key in keys_of(again)} == {
            f"{place.name}.commit.json",
            commit.attempt.split("/")[2],
        }, "no half upload stays behind"
        files = [path for path in (again.path.parent / "records").rglob("*") if path.is_file()]
        assert [path.name for path in files] == [f"{place.name}.commit.json"]
    assert 1 < whole < num_kills / 2, "only what was committed is found"


def test_of_two_writers_at_once_one_wins_and_both_read_its_store(machines):
    for _ in range(3):
        roots, errors = [machines("a"), machines("b")], []
        stores = [root.tokens(RECIPE, UNIT) for root in roots]
        for store in stores:
            write_tokens(store)
        barrier = threading.Barrier(2)

        def publish(root, store, barrier=barrier, errors=errors):
            try:
                barrier.wait()
                root.publish(store)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=publish, args=pair) for pair in zip(roots, stores, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        first, second = (records.read_record(store) for store in stores)
        assert first == second
        assert {key.split("/")[2] for key in keys_of(roots[0])} == {
            f"{stores[0].name}.commit.json",
            first.attempt.split("/")[2],
        }, "the files of the other are gone"
        assert all(np.array_equal(read_all(store), TOKENS) for store in stores)
        roots[0].remove(stores[0])
        assert not machines("b").fetch(stores[1])


def test_a_commit_that_is_there_stays_and_the_later_upload_is_removed(machines):
    here, there = machines("a"), machines("b")
    write_tokens(there.tokens(RECIPE, UNIT))
    store = publish_tokens(here)
    key, before = f"tokens/{RECIPE}/{store.name}", keys_of(here)
    commit = commits.upload_store(there.bucket, key, there.tokens(RECIPE, UNIT), f"{key}.attempt-later")
    assert commit == records.read_record(store)
    assert keys_of(here) == before


def test_where_the_server_knows_no_condition_the_last_writer_wins_and_nothing_mixes(server, machines, monkeypatch):
    monkeypatch.setattr(Bucket, "put_new", lambda self, key, data: self.put(key, data) or True)
    here, there = machines("a"), machines("b")
    for root in (here, there):  # both before either has committed
        write_tokens(root.tokens(RECIPE, UNIT))
    key = f"tokens/{RECIPE}/{UNIT[:32]}.zarr"
    commits.upload_store(here.bucket, key, here.tokens(RECIPE, UNIT), f"{key}.attempt-1")
    commits.upload_store(there.bucket, key, there.tokens(RECIPE, UNIT), f"{key}.attempt-2")
    for name in ("a", "b", "c"):
        store = machines(name).tokens(RECIPE, UNIT)
        assert machines(name).fetch(store) and records.read_record(store).attempt == f"{key}.attempt-2"
        assert np.array_equal(read_all(store), TOKENS)


@pytest.mark.parametrize("name", ["fetch", "publish", "remove"])
def test_processes_of_one_machine_wait_for_each_other_at_a_store(machines, name):
    root, done = machines("a"), threading.Event()
    store = root.tokens(RECIPE, UNIT)
    write_tokens(store)

    def work():
        getattr(root, name)(store)
        done.set()

    thread = threading.Thread(target=work)
    with root._locked(store):
        thread.start()
        assert not done.wait(0.2) and not keys_of(root) and store.is_dir()
    thread.join()
    assert done.is_set() and bool(keys_of(root)) == (name != "remove")


def test_the_second_writer_of_one_machine_finds_the_store_published(machines, server):
    root, same = machines("a"), machines("a")
    store = publish_tokens(root)
    server.requests.clear()
    same.publish(store)
    assert not [request for request in server.requests if request.startswith("PUT")]
    assert np.array_equal(read_all(store), TOKENS)


def test_what_another_machine_published_first_is_what_the_later_one_reads(machines):
    here, there = machines("a"), machines("b")
    write_tokens(there.tokens(RECIPE, UNIT), -TOKENS)
    publish_tokens(here)
    there.publish(there.tokens(RECIPE, UNIT))
    assert np.array_equal(read_all(there.tokens(RECIPE, UNIT)), TOKENS)


def test_a_file_is_published_once_and_again_when_it_was_removed_elsewhere_and_a_store_is_not(machines, server):
    here, there = machines("a"), machines("b")
    store, manifest = publish_tokens(here), here.manifest(RECIPE)
    manifest.parent.mkdir(parents=True)
    manifest.write_bytes(b"{}")
    here.publish(manifest)
    server.requests.clear()
    here.publish(manifest)
    assert not [request for request in server.requests if request.startswith("PUT")]
    for place in (there.tokens(RECIPE, UNIT), there.manifest(RECIPE)):
        there.remove(place)
    for place in (store, manifest):  # of the store only tables are left here
        here.publish(place)
    assert {key.split("/")[0] for key in keys_of(here)} == {"manifests"}


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"")], ids=["gone", "cut"])
def test_what_was_lost_here_is_fetched_again_and_never_published(machines, harm):
    here, there = machines("a"), machines("b")
    write_tokens(here.tokens(RECIPE, UNIT))
    harm(here.tokens(RECIPE, UNIT) / layout.SEGMENTS_FILE)
    with pytest.raises(StoreDamagedError, match=layout.SEGMENTS_FILE):  # finished here, but not whole any more
        here.fetch(here.tokens(RECIPE, UNIT))
    assert not keys_of(here)
    here.remove(here.tokens(RECIPE, UNIT))
    publish_tokens(here)
    assert there.fetch(there.tokens(RECIPE, UNIT))
    harm(there.tokens(RECIPE, UNIT) / layout.SEGMENTS_FILE)
    there = machines("b")
    assert there.fetch(there.tokens(RECIPE, UNIT))
    assert read_table(there.tokens(RECIPE, UNIT), layout.SEGMENTS_FILE).num_rows == 1


def test_what_an_upload_left_is_removed_by_the_next_one(machines):
    root = machines("a")
    store = root.tokens(RECIPE, UNIT)
    dead = commits.new_attempt(f"tokens/{RECIPE}/{store.name}")
    root.bucket.put(f"{dead}/store.json", b"half")
    note = records.note_path(store, mirror.UPLOAD_SUFFIX)
    note.parent.mkdir(parents=True)
    note.write_text(dead)
    publish_tokens(root)
    assert not [key for key in keys_of(root) if key.startswith(dead)] and not note.exists()


def test_what_was_removed_elsewhere_is_gone_here(machines):
    here = machines("a")
    publish_tokens(here)
    there = machines("b")
    assert there.fetch(there.tokens(RECIPE, UNIT))
    here.remove(here.tokens(RECIPE, UNIT))
    assert not keys_of(here) and not files_below(here.path)
    there = machines("b")  # as the next command
    assert not there.fetch(there.tokens(RECIPE, UNIT))
    assert not files_below(there.path)


@pytest.mark.parametrize("arrives", [None, b"less"], ids=["lost", "cut"])
def test_what_did_not_arrive_is_not_committed(machines, monkeypatch, arrives):
    root, upload = machines("a"), Bucket.upload

    def lose(bucket, key, path):
        if not key.endswith(CHUNKS):
            upload(bucket, key, path)
        elif arrives is not None:
            bucket.put(key, arrives)

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "upload", lose)
        with pytest.raises(StoreDamagedError, match=rf"{CHUNKS} (is missing|has 4 bytes)"):
            publish_tokens(root)
    assert not machines("b").fetch(machines("b").tokens(RECIPE, UNIT))
    store = root.tokens(RECIPE, UNIT)
    assert root.fetch(store) and np.array_equal(read_all(store), TOKENS)


def test_a_removal_that_was_interrupted_leaves_no_half_store(machines, monkeypatch):
    here = machines("a")
    store = publish_tokens(here)
    with monkeypatch.context() as patch:
        patch.setattr(commits, "delete_attempt", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            here.remove(store)
    assert not machines("b").fetch(machines("b").tokens(RECIPE, UNIT))


def test_what_was_made_again_elsewhere_is_fetched_again(machines):
    here = machines("a")
    publish_tokens(here)
    there = machines("b")
    assert there.fetch(there.tokens(RECIPE, UNIT))
    here.remove(here.tokens(RECIPE, UNIT))
    write_tokens(here.tokens(RECIPE, UNIT), -TOKENS)
    here.publish(here.tokens(RECIPE, UNIT))
    there = machines("b")
    assert there.fetch(there.tokens(RECIPE, UNIT))
    assert np.array_equal(read_all(there.tokens(RECIPE, UNIT)), -TOKENS)


def change_object(root, name, change):
    attempt = records.read_record(root.tokens(RECIPE, UNIT)).attempt
    key = f"{attempt}/{name}"
    content = root.bucket.get(key)[0]
    root.bucket.delete([key])
    if change is not None:
        root.bucket.put(key, change(content))


@pytest.mark.parametrize("name", [CHUNKS, "store.json", "segments.parquet"])
@pytest.mark.parametrize("change", [None, lambda content: content[:-1]], ids=["gone", "cut"])
def test_a_missing_or_cut_object_is_found_without_reading_and_the_store_can_be_made_again(machines, name, change):
    root = machines("a")
    publish_tokens(root)
    change_object(root, name, change)
    other = machines("b")
    with pytest.raises(
        StoreDamagedError, match=rf"{name}.* (is missing|bytes, not \d+); run `python stages/encode.py`"
    ):
        other.fetch(other.tokens(RECIPE, UNIT))
    other.remove(other.tokens(RECIPE, UNIT))
    publish_tokens(other)
    assert np.array_equal(read_all(other.tokens(RECIPE, UNIT)), TOKENS)


def flip(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("name", ["store.json", "zarr.json", "tokens/zarr.json", "steps.parquet"])
def test_a_flipped_bit_in_what_is_fetched_is_found(machines, name):
    root = machines("a")
    publish_tokens(root)
    change_object(root, name, lambda content: flip(content, len(content) // 2))
    other = machines("b")
    with pytest.raises(StoreDamagedError, match=rf"{name} has changed \(sha256 differs\)"):
        other.fetch(other.tokens(RECIPE, UNIT))
    assert not files_below(other.path)


@pytest.mark.parametrize("at", [100, 8 * N * D * 2 + 1, -1], ids=["data", "checksum", "index"])
def test_a_flipped_bit_in_a_token_chunk_is_named_when_it_is_read(machines, at):
    root = machines("a")
    store = publish_tokens(root)
    change_object(root, CHUNKS, lambda content: flip(content, at % len(content)))
    for machine in ("a", "b"):
        root = machines(machine)
        store = root.tokens(RECIPE, UNIT)
        assert root.fetch(store)
        with pytest.raises(StoreDamagedError, match=r"tokens/c/0/0/0"):
            read_all(store)
        with pytest.raises(StoreDamagedError, match=r"tokens/c/0/0/0 has changed"):
            check_store(store, read_data=True)


def test_what_is_kept_hides_no_damage_from_a_check(machines):
    root = machines("a")
    store = publish_tokens(root)
    assert np.array_equal(read_all(store), TOKENS)
    change_object(root, CHUNKS, lambda content: flip(content, 100))
    assert np.array_equal(read_all(store), TOKENS), "from what is kept here"
    with ArrayReader(store, use_kept=False) as reader:
        reader.check_chunk(1)
        with pytest.raises(StoreDamagedError, match=r"chunk 0 .*its checksum does not match"):
            reader.check_chunk(0)


def test_a_chunk_object_that_vanishes_never_reads_as_numbers(machines):
    root = machines("a")
    store = publish_tokens(root)
    change_object(root, CHUNKS, None)
    with pytest.raises(StoreDamagedError, match=r"tokens/c/0/0/0: it is missing"):
        read_all(store)


def test_a_damaged_commit_is_named(machines):
    root = machines("a")
    store = publish_tokens(root)
    (key,) = [key for key in keys_of(root) if key.endswith(".commit.json")]
    root.bucket.put(key, b"{}")
    other = machines("b")
    with pytest.raises(StoreDamagedError, match=r"commit.json is no valid commit"):
        other.fetch(other.tokens(RECIPE, UNIT))
    root.remove(store)
    assert not other.fetch(other.tokens(RECIPE, UNIT))


def test_refresh_brings_everything_and_names_what_is_damaged(machines):
    here = machines("a")
    publish_tokens(here)
    here.manifest(RECIPE).parent.mkdir(parents=True)
    here.manifest(RECIPE).write_bytes(b"{}")
    here.publish(here.manifest(RECIPE))
    there = machines("b")
    assert there.refresh() == []
    assert read_store_file(there.tokens(RECIPE, UNIT)) == read_store_file(here.tokens(RECIPE, UNIT))
    change_object(here, CHUNKS, None)
    here.remove(here.manifest(RECIPE))
    there = machines("b")
    (damage,) = there.refresh()
    assert CHUNKS in damage
    assert not files_below(there.path)


def test_uploads_that_no_commit_names_are_removed_and_no_others(machines, monkeypatch):
    monkeypatch.setattr(commits, "ABANDONED_AFTER", timedelta(days=-1))  # of whatever age
    here, there = machines("a"), machines("b")
    publish_tokens(here)
    assert there.fetch(there.tokens(RECIPE, UNIT))
    here.remove(here.tokens(RECIPE, UNIT))
    store = publish_tokens(here)  # under another attempt than b has heard of
    dead = commits.new_attempt(f"tokens/{RECIPE}/{store.name}")
    here.bucket.put(f"{dead}/store.json", b"12345")
    before = keys_of(here)
    for root in (here, there, machines("c")):
        assert root.find_abandoned() == {dead: 5}
    there.remove_abandoned(dead)
    assert keys_of(here) == before - {f"{dead}/store.json"}
    assert machines("c").fetch(machines("c").tokens(RECIPE, UNIT))


def test_other_machines_begin_with_other_units_and_nobody_waits_for_a_dead_one(machines):
    here, there = machines("a"), machines("b")
    store = there.tokens(RECIPE, UNIT)
    dead = here.claim(here.tokens(RECIPE, UNIT))
    assert dead is not None
    assert there.claim(store) is None
    assert not there.is_claimed(store), "so it is asked for again at once"
    claim = there.claim(store)
    assert claim is not None
    publish_tokens(there)
    claim.release()
    assert not [key for key in keys_of(there) if key.endswith(".hint")]


def test_a_claim_that_led_to_nothing_is_taken_back(machines):
    here, there = machines("a"), machines("b")
    here.claim(here.tokens("0" * 32, UNIT)).release()
    assert not keys_of(here)
    assert there.claim(there.tokens("0" * 32, UNIT)) is not None


def test_a_root_travels_to_another_machine(machines):
    here = pickle.dumps(machines("a"))
    publish_tokens(machines("a"))
    there = machines("b")
    travelled = pickle.loads(here)
    assert travelled.path == there.path and travelled.fetch(there.tokens(RECIPE, UNIT))


def test_reading_keeps_what_was_read_within_the_bound(machines, monkeypatch):
    publish_tokens(machines("a"))
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)
    monkeypatch.setenv("JEPA_CACHE_LOCAL_GB", "8e-6")
    root = machines("b")
    assert root.fetch(root.tokens(RECIPE, UNIT))
    assert np.array_equal(read_all(root.tokens(RECIPE, UNIT)), TOKENS)
    kept = [path.stat().st_size for path in (root.path.parent / "blocks").iterdir()]
    assert 4000 < sum(kept) <= 8000


@pytest.mark.parametrize("given", ["much", "-1", "nan", "1e12"])
def test_a_bound_that_is_no_number_is_refused(monkeypatch, given):
    monkeypatch.setenv("JEPA_CACHE_LOCAL_GB", given)
    with pytest.raises(ValueError, match=r"\$JEPA_CACHE_LOCAL_GB must be gigabytes"):
        records.local_bytes()


def test_one_url_on_two_servers_has_two_mirrors(machines, monkeypatch):
    here = machines("a")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert machines("a").path != here.path


def test_the_configured_root_may_be_a_url(machines, monkeypatch, tmp_path):
    root = machines("a")
    assert resolve_cache_root(root.name, tmp_path).path == root.path
    monkeypatch.setenv("JEPA_CACHE_HOME", root.name)
    assert resolve_cache_root(None, tmp_path).name == root.name
    with pytest.raises(ValueError, match=r"s3://bucket/prefix or gs://bucket/prefix; got 'ftp://x/y'"):
        resolve_cache_root("ftp://x/y", tmp_path)


def test_a_root_that_cannot_be_written_is_told_before_any_work(server, machines):
    root = machines("a")
    root.check_writable()
    assert not keys_of(root)
    server.faults.append(Fault("PUT", "status", 403, "<Error><Code>AccessDenied</Code></Error>"))
    with pytest.raises(objects.ObjectStoreError, match=r"cannot write in s3://bucket/.*: not permitted"):
        root.check_writable()


def test_a_record_names_no_machine_and_no_secret(machines):
    store = publish_tokens(machines("a"))
    document = json.loads(records.note_path(store).read_bytes())
    assert set(document) == {"commit", "tag", "url"}
    assert isinstance(Bucket(document["url"]), Bucket)
