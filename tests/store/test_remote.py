"""Claims: a root in a bucket gives every machine the same bytes as a folder does; a store is whole or absent at every moment.

Requests survive dropped connections, and what cannot be put right is told in words. Chunks of tokens kept here stay within
the limit, and no command loses what it reads. A damaged copy here never speaks for what lies in the bucket.

Two caches of this machine stand for two machines: they share nothing but the bucket.
"""

import hashlib
import itertools
import json
import os
import pickle
import shutil
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from jepa_cache.store import layout, remote
from jepa_cache.store.layout import StoreDamagedError, check_store, read_store_file
from jepa_cache.store.reader import ArrayReader, read_table
from jepa_cache.store.recipe import canonical_json, fingerprint
from jepa_cache.store.remote import Bucket, ObjectStoreError, resolve_cache_root
from jepa_cache.store.root import MARKER, CacheRoot
from jepa_cache.store.writer import TokenWriter
from tests.store.s3_server import Fault
from tests.store.test_token_store import tables

N, D, NUM_STEPS = 3, 8, 520
TOKENS = np.random.default_rng(0).standard_normal((NUM_STEPS, N, D)).astype(np.float16)
UNIT, RECIPE = "5" * 64, fingerprint({})
CHUNKS = "tokens/c/0/0/0"


def place(root, unit=UNIT):
    return root.tokens(RECIPE, unit)


def write_tokens(store, tokens=TOKENS):
    with TokenWriter(store, num_tokens=N, width=D) as writer:
        writer.append(tokens)
        writer.publish(*tables(len(tokens)), {"recipe": {}}, {"device": "cpu"})


def publish_tokens(root, unit=UNIT):
    store = place(root, unit)
    write_tokens(store)
    root.publish(store)
    return store


def read_all(store):
    out = np.empty_like(TOKENS)
    with ArrayReader(store) as reader:
        reader.read(0, out)
    return out


def read_from(root):
    """All tokens, as a command reads them."""
    with root.pulled([place(root)]):
        return read_all(place(root))


def pull(root, stores, *, again=False):
    with root.pulled(stores, again=again):
        pass


def commit_of(root):
    return root._read_record(place(root))


def keys_of(root):
    return set(root.bucket.list(""))


def files_below(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {MARKER}


@pytest.mark.parametrize("kind", ["refuse", "deaf", "cut"])
def test_every_request_survives_dropped_connections_and_a_server_that_asks_for_patience(
    server, machines, tmp_path, kind, monkeypatch
):
    bucket, data = machines("a").bucket, os.urandom(50_000)
    bucket.put("warm", b"")
    bucket.put("a/b", data) if kind == "cut" else None  # the answer to PUT has no body that could be cut
    for pattern in ("PUT .*/a/b", "GET .*/a/b", r"GET .*list-type", "POST .*delete")[kind == "cut" :]:
        server.faults.append(Fault(pattern, kind, 7, times=3))
    bucket.put("a/b", data)
    assert bucket.get("a/b")[0] == data and list(bucket.list("a")) == ["a/b"]
    server.faults.append(Fault("GET .*/a/b", kind, 100, times=3))
    assert bucket.download("a/b", len(data), tmp_path / "file") == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "file").read_bytes() == data
    bucket.delete(["a/b"])
    assert bucket.get("a/b") is None
    server.faults.append(Fault("PUT .*/new", "status", 503, "<Error><Code>SlowDown</Code></Error>", times=5))
    assert bucket.put("new", b"1", new=True) and not bucket.put("new", b"2", new=True) and bucket.get("new")[0] == b"1"
    if kind == "refuse":  # a file in parts
        monkeypatch.setattr(remote, "PART_BYTES", 5 << 20)
        (tmp_path / "large").write_bytes(data := os.urandom(11 << 20))
        patterns = ("uploads=", "partNumber=2", "partNumber=3", "POST .*uploadId")
        server.faults += [Fault(*it) for it in zip(patterns, ("deaf", "refuse", "deaf", "refuse"), strict=True)]
        bucket.put("a", tmp_path / "large")
        assert bucket.download("a", len(data), tmp_path / "b") == hashlib.sha256(data).hexdigest()
    (tmp_path / "empty").touch()
    bucket.put("empty", tmp_path / "empty")
    assert bucket.get("empty")[0] == b""


DENIED = "<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>no</Message></Error>"
MOVED = DENIED.replace("AccessDenied", "PermanentRedirect")
PERMISSIONS = "not permitted; the credentials need list, get, put and delete"
REFUSALS = {
    "no writing": (Fault("PUT", "status", 403, DENIED), PERMISSIONS),
    "region": (Fault("GET", "status", 301, MOVED), "another region; set AWS_REGION"),
    "network": (Fault("GET", "refuse", times=99), "cannot be reached; check the network"),
}


@pytest.mark.parametrize(("fault", "said"), REFUSALS.values(), ids=REFUSALS)
def test_what_the_server_refuses_is_told_before_any_work(server, machines, fault, said):
    root = machines("a")
    server.faults.append(fault)
    with pytest.raises(ObjectStoreError, match=said) as raised:
        root.check_writable()
    server.faults.clear()
    assert root.name in str(raised.value) and "\n" not in str(raised.value)
    root.check_writable()
    assert not keys_of(root)


def test_no_bucket_no_credentials_and_what_is_no_url_are_named_with_a_way_out(machines, monkeypatch, tmp_path):
    other = Bucket("s3://nosuch/prefix")
    for request in (lambda: other.put("a", b""), lambda: other.get("a"), lambda: other.list("a")):
        with pytest.raises(ObjectStoreError, match=r"there is no bucket 'nosuch'; make it, or correct cache.root"):
            request()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(ObjectStoreError, match="no credentials were found; set AWS_ACCESS_KEY_ID"):
        machines("a").bucket.list("a")
    for url in ("s3://", "s3:/bucket", "az://bucket/x", "s3://key@bucket/x", "s3://bucket/x?y=1", "s3://b c/x"):
        with pytest.raises(ObjectStoreError, match="s3://bucket/prefix or gs://bucket/prefix; got"):
            resolve_cache_root(url, tmp_path)


def test_a_root_is_found_by_its_url_and_has_a_folder_for_each_server(machines, monkeypatch, tmp_path):
    here = machines("a")
    monkeypatch.setenv("JEPA_CACHE_HOME", here.name)
    assert [resolve_cache_root(name, tmp_path).path for name in (None, here.name)] == [here.path] * 2
    travelled, there = pickle.dumps(here), machines("b")
    assert pickle.loads(travelled).path == there.path != here.path
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert machines("a").path != here.path


# A commit object as the first release wrote it.
FIRST_COMMIT = """{
  "attempt": "manifests/%(digest)s.json.attempt-0123456789abcdef",
  "commit_version": 1,
  "files": {
    "%(digest)s.json": {
      "num_bytes": 3,
      "sha256": "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356"
    }
  }
}
"""


def test_what_the_first_release_published_is_read_and_its_notes_here_are_understood(machines):
    root = machines("a")
    place = root.manifest(RECIPE)
    content = FIRST_COMMIT % {"digest": RECIPE}
    root.bucket.put(f"manifests/{RECIPE}.json.attempt-0123456789abcdef/{RECIPE}.json", b"{}\n")
    root.bucket.put(f"manifests/{RECIPE}.json.commit.json", content.encode())
    assert root.fetch(place) and place.read_bytes() == b"{}\n"
    assert canonical_json(root._read_record(place).document()) == content.encode()
    note = root._record_path(place)
    note.write_text(json.dumps({**json.loads(note.read_bytes()), "url": root.name}))
    assert canonical_json(root._read_record(place).document()) == content.encode()
    root.remove(place)
    assert not keys_of(root)


class Killed(BaseException):
    pass


def publish_until(monkeypatch, root, store, number):
    """Whether the publisher came to its end, and was not killed before or after a request, at moment `number` of all."""
    ask, moments = Bucket._ask, iter(range(number))

    def live():
        if next(moments, None) is None:
            raise Killed

    with monkeypatch.context() as patch, suppress(Killed):
        patch.setattr(Bucket, "_ask", lambda *given: (live(), ask(*given), live())[1])
        root.publish(store)
        return True
    return False


def test_a_publisher_killed_at_any_request_leaves_a_whole_store_or_none_and_the_next_run_finishes(
    machines, monkeypatch, tmp_path
):
    """Enumerated: before and after every request of a store of two files, each in a fresh prefix; then the same machine goes on."""
    original, url = place(CacheRoot(tmp_path / "folder")), machines("a").name
    original.mkdir(parents=True)
    (original / "values").write_bytes(b"12345")
    layout.write_store_file(original, original, {"recipe": {}}, {})

    def see_from(machine):
        machines(machine)
        root = resolve_cache_root(f"{url}-{number}", Path())
        return root, place(root)

    whole = 0
    for number in itertools.count():
        root, store = see_from("a")
        shutil.copytree(original, store)
        if publish_until(monkeypatch, root, store, number):
            break
        for machine in "ba":
            root, store = see_from(machine)
            found = root.fetch(store)
            assert found or machine == "b", "what was finished is uploaded by the next run"
            whole += found and machine == "b"
            assert not found or check_store(store, read_data=True) == check_store(original)
        left = {key.partition(".attempt-")[2][:16] for key in keys_of(root)} - {"", commit_of(root).attempt[-16:]}
        assert len(left) <= 1, "at most the half upload, which `gc` removes when it is a day old"
    assert 1 < whole < number / 2 and number > 2 * len(files_below(original)), "only what was committed is found"


@pytest.mark.parametrize("condition", [True, False], ids=["S3", "a server that ignores the condition"])
def test_one_of_two_uploads_is_committed_whole_and_the_other_is_removed(machines, monkeypatch, condition):
    here, there = machines("a"), machines("b")
    put = Bucket.put
    if not condition:
        monkeypatch.setattr(Bucket, "put", lambda self, key, content, new=False: put(self, key, content))
    write_tokens(place(there), -TOKENS)
    publish_tokens(here)
    before = keys_of(here)
    there._push(place(there))  # as one that looked before the other had committed
    assert not condition or (keys_of(here) == before and commit_of(there) == commit_of(here))
    for root in (machines("a"), there, machines("c")):
        assert np.array_equal(read_from(root), TOKENS if condition else -TOKENS)


def test_what_was_lost_here_is_fetched_again_and_never_published(machines):
    here, there = machines("a"), machines("b")
    for name in (layout.SEGMENTS_FILE, CHUNKS):
        write_tokens(place(here))
        (place(here) / name).write_bytes(flip((place(here) / name).read_bytes(), 9))
        with pytest.raises(StoreDamagedError, match=name):  # finished here, but not whole any more
            here.fetch(place(here))
        assert not keys_of(here)
        here.remove(place(here))
    publish_tokens(here)
    for harm in (Path.unlink, lambda path: path.write_bytes(b"")):
        assert there.fetch(place(there))
        harm(place(there) / layout.SEGMENTS_FILE)
        assert there.fetch(place(there))
        assert read_table(place(there), layout.SEGMENTS_FILE).num_rows == 1
    (place(there) / layout.SEGMENTS_FILE).unlink()
    here.remove(place(here))
    publish_tokens(here)  # meanwhile, under another attempt than b has listed
    assert there.fetch(place(there)) and commit_of(there) == commit_of(here)


def test_what_was_removed_elsewhere_is_gone_here_and_what_was_made_again_is_pulled_again(machines):
    here = machines("a")
    publish_tokens(here)
    assert np.array_equal(read_from(machines("b")), TOKENS)
    here.remove(place(here))
    assert not keys_of(here) and not files_below(here.path)
    there = machines("b")  # as the next command
    assert not there.fetch(place(there)) and not files_below(there.path)
    for tokens in (TOKENS, -TOKENS):
        write_tokens(place(here), tokens)
        here.publish(place(here))
        assert np.array_equal(read_from(machines("b")), tokens)
        here.remove(place(here))


@pytest.mark.parametrize("arrives", [None, b"less"], ids=["lost", "cut"])
def test_what_did_not_arrive_is_not_committed(machines, monkeypatch, arrives):
    root, put = machines("a"), Bucket.put

    def lose(bucket, key, content, *, new=False):
        chunk = key.endswith(CHUNKS)
        return (chunk and arrives is None) or put(bucket, key, arrives if chunk else content, new=new)

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "put", lose)
        with pytest.raises(StoreDamagedError, match=rf"{CHUNKS} is missing, or has not"):
            publish_tokens(root)
    assert not machines("b").fetch(place(machines("b")))
    assert np.array_equal(read_from(root), TOKENS)  # and is pushed by the next command


def change_object(root, name, change):
    key = f"{commit_of(root).attempt}/{name}"
    content = root.bucket.get(key)[0]
    root.bucket.delete([key])
    if change is not None:
        root.bucket.put(key, change(content))


def flip(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


HARMED = {
    "gone": (CHUNKS, None, r"is missing, or has not \d+ bytes; run `jepa-cache verify"),
    "cut": ("store.json", lambda content: content[:-1], r"is missing, or has not \d+ bytes"),
    "flipped": (CHUNKS, lambda content: flip(content, len(content) // 2), r"has changed \(sha256 differs\)"),
    "store.json flipped": ("store.json", lambda content: flip(content, 99), r"has changed \(sha256 differs\)"),
}


@pytest.mark.parametrize(("name", "change", "said"), HARMED.values(), ids=HARMED)
def test_what_is_harmed_in_the_bucket_is_found_when_it_is_pulled_and_when_it_is_verified(machines, name, change, said):
    root = machines("a")
    store = publish_tokens(root)
    change_object(root, name, change)
    other = machines("b")
    for reader, again in ((other, False), (root, True)):  # who has a whole copy here looks all the same
        with pytest.raises(StoreDamagedError, match=f"{name} {said}"):
            pull(reader, [place(reader)], again=again)
    assert np.array_equal(read_all(store), TOKENS), "the whole copy stays"
    assert name not in files_below(place(other))


@pytest.mark.parametrize(
    "change",
    [
        lambda commit: {},
        lambda commit: {**commit, "attempt": "tokens"},
        lambda commit: {**commit, "attempt": commit["attempt"].replace(UNIT[:32], "6" * 32)},
        lambda commit: {**commit, "files": {"../../other": commit["files"]["store.json"]}},
    ],
    ids=["empty", "objects of others", "another store's objects", "files of others"],
)
def test_a_commit_that_is_none_or_names_what_is_not_its_own_is_named_and_nothing_else_is_removed(machines, change):
    root = machines("a")
    store = publish_tokens(root)
    before = keys_of(root)
    (key,) = [key for key in before if key.endswith(".commit.json")]
    root.bucket.put(key, json.dumps(change(json.loads(root.bucket.get(key)[0]))).encode())
    other = machines("b")
    with pytest.raises(StoreDamagedError, match=r"commit.json is no valid commit"):
        other.fetch(place(other))
    root.remove(store)
    assert not other.fetch(place(other)) and keys_of(root) == before - {key}


def test_refresh_brings_everything_and_names_what_is_damaged(machines):
    here = machines("a")
    publish_tokens(here)
    here.manifest(RECIPE).parent.mkdir(parents=True)
    here.manifest(RECIPE).write_bytes(b"{}")
    here.publish(here.manifest(RECIPE))
    there = machines("b")
    assert there.refresh() == []
    assert read_store_file(place(there)) == read_store_file(place(here))
    change_object(here, CHUNKS, None)
    here.remove(here.manifest(RECIPE))
    there = machines("b")
    (damage,) = there.refresh()
    assert CHUNKS in damage and not there.manifest(RECIPE).exists()


def test_uploads_that_no_commit_names_are_removed_and_no_others(machines, monkeypatch):
    here, there = machines("a"), machines("b")
    publish_tokens(here)
    assert there.fetch(place(there))
    here.remove(place(here))
    store = publish_tokens(here)  # under another attempt than b has heard of
    dead = f"tokens/{RECIPE}/{store.name}.attempt-{'0' * 16}"
    here.bucket.put(f"{dead}/store.json", b"12345")
    here.bucket.put("tokens/model.attempt-2/weights", b"somebody else's")
    before = keys_of(here)
    assert here.find_abandoned() == {}, "younger than a day: somebody may be at it"
    monkeypatch.setattr(remote, "ABANDONED_AFTER", timedelta(days=-1))
    for root in (here, there, machines("c")):
        assert root.find_abandoned() == {dead: 5}
    there.remove_abandoned(dead)
    assert keys_of(here) == before - {f"{dead}/store.json"}
    assert machines("c").fetch(place(machines("c")))


UNITS = [digit * 64 for digit in "1234"]


def publish_units(root):
    return [publish_tokens(root, unit) for unit in UNITS]


def limit_to(monkeypatch, root, count):
    """Permit chunks of so many stores."""
    num_bytes = root._chunk_bytes(place(root, UNITS[0]))
    monkeypatch.setenv("JEPA_CACHE_LOCAL_GB", f"{count * num_bytes / 1e9:.9f}")


def whole_units(root):
    return [unit[0] for unit in UNITS if (place(root, unit) / CHUNKS).is_file()]


def test_chunks_beyond_the_limit_go_those_of_the_least_recently_used_stores_first(machines, monkeypatch):
    stores = publish_units(machines("a"))
    root = machines("a")
    assert whole_units(root) == list("1234"), "what was made here need not be pulled"
    for number, store in enumerate(stores):
        os.utime(store, (number, number))
    pull(root, stores[:1])
    limit_to(monkeypatch, root, 2.5)
    there = place(root)
    write_tokens(there)
    os.utime(there, (0, 0))
    root._make_room()
    assert (there / CHUNKS).is_file(), "what is not pushed yet makes no room"
    os.utime(there)
    root.publish(there)
    assert whole_units(root) == ["1"] and (there / CHUNKS).is_file()
    assert all(root.fetch(store) and read_table(store, layout.SEGMENTS_FILE).num_rows == 1 for store in stores)
    monkeypatch.setenv("JEPA_CACHE_LOCAL_GB", "0")
    root._make_room()
    assert whole_units(root) == [] and not (there / CHUNKS).exists()


def test_commands_at_once_share_the_limit_and_lose_nothing_that_they_read(machines, monkeypatch):
    publish_units(machines("a"))
    root, other = machines("b"), machines("b")
    stores = [place(root, unit) for unit in UNITS]
    with other.pulled(stores[:1]):
        limit_to(monkeypatch, root, 3)
        for wanted in (stores, stores[1:]):
            with pytest.raises(
                ObjectStoreError, match=r"others that run now, read .* from s3.*set JEPA_CACHE_LOCAL_GB="
            ):
                pull(root, wanted)
        assert whole_units(root) == ["1"], "it is refused before anything is pulled"
        with root.pulled(stores[:3]):
            assert whole_units(root) == ["1", "2", "3"], "what both read counts once"
        with root.pulled(stores[2:]):
            assert whole_units(root) == ["1", "3", "4"], "what another reads stays"
    (root.path.parent / "holds" / ".jepa-cache-0123456789ab-stores").write_text(f"{stores[0].relative_to(root.path)}")
    with root.pulled(stores[1:]):  # what a dead one held, it holds no more
        assert whole_units(root) == ["2", "3", "4"]
