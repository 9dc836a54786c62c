"""Claims: requests survive dropped connections; what cannot be mended is told in words; the first of two objects stays.

What is kept of objects on the local disk stays within its bound and is never wrong.
"""

import os
import sys
import threading
import time
from datetime import UTC, datetime, timedelta

import google_crc32c
import numpy as np
import pytest

from jepa_cache.store import blocks, commits, objects
from jepa_cache.store.blocks import BlockCache, RemoteFile
from jepa_cache.store.damage import StoreDamagedError
from jepa_cache.store.objects import Bucket, ObjectStoreError, StoredObject
from tests.store.s3_server import Fault


@pytest.fixture
def bucket(proxied, tmp_path):
    """A prefix of its own."""
    return Bucket(f"s3://bucket/{tmp_path.name}")


@pytest.mark.parametrize("kind", ["refuse", "deaf", "cut"])
def test_every_request_survives_dropped_connections(server, bucket, kind):
    data = os.urandom(50_000)
    bucket.put("warm", b"")
    bucket.put("a/b", data) if kind == "cut" else None  # the answer to PUT has no body that could be cut
    for pattern in ("PUT .*/a/b", "GET .*/a/b", r"GET .*list-type", "POST .*delete")[kind == "cut" :]:
        server.faults.append(Fault(pattern, kind, 7, times=3))
    bucket.put("a/b", data)
    assert bucket.get("a/b")[0] == data
    assert list(bucket.list("a")) == ["a/b"]
    bucket.delete(["a/b"])
    assert bucket.get("a/b") is None


@pytest.mark.parametrize("kind", ["refuse", "deaf", "cut"])
def test_ranges_survive_dropped_connections(server, bucket, kind):
    data = os.urandom(50_000)
    bucket.put("a", data)
    server.faults.append(Fault("GET .*/a$", kind, 100, times=3))
    parts = bucket.get_ranges("a", [0, 10_000, 40_000], [10_000, 500, 10_000])
    assert [bytes(part) for part in parts] == [data[:10_000], data[10_000:10_500], data[40_000:]]


def test_a_file_in_parts_survives_dropped_connections(server, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "PART_BYTES", 5 << 20)
    data = os.urandom(11 << 20)
    (tmp_path / "file").write_bytes(data)
    bucket.put("warm", b"")
    server.faults += [
        Fault("uploads=", "deaf"),
        Fault("partNumber=2", "refuse", times=2),
        Fault("partNumber=3", "deaf"),
    ]
    server.faults += [Fault("POST .*uploadId", "refuse")]
    bucket.upload("a", tmp_path / "file")
    assert b"".join(bucket.iter_parts("a", len(data))) == data


def test_a_server_that_asks_for_patience_gets_it(server, bucket):
    bucket.put("warm", b"")
    server.faults.append(Fault("PUT .*/a", "status", 503, "<Error><Code>SlowDown</Code></Error>", times=5))
    bucket.put("a", b"1")
    assert bucket.get("a")[0] == b"1"


def test_an_empty_file_is_an_empty_object(bucket, tmp_path):
    (tmp_path / "file").touch()
    bucket.upload("a", tmp_path / "file")
    assert bucket.get("a")[0] == b""


def test_the_first_of_two_new_objects_stays(bucket):
    assert bucket.put_new("a", b"1") and not bucket.put_new("a", b"2")
    assert bucket.get("a")[0] == b"1"


def test_a_bucket_travels_to_another_process_as_its_url(bucket):
    import pickle

    bucket.put("a", b"1")
    assert pickle.loads(pickle.dumps(bucket)).get("a")[0] == b"1"


DENIED = "<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>no</Message></Error>"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("PUT", "status", 403, DENIED), "not permitted; the credentials need list, get, put and delete"),
        (Fault("GET", "status", 403, DENIED), "not permitted"),
        (
            Fault("GET", "status", 301, DENIED.replace("AccessDenied", "PermanentRedirect")),
            "another region; set AWS_REGION",
        ),
        (Fault("GET", "refuse", times=99), "cannot be reached; check the network"),
    ],
    ids=["no writing", "no listing", "region", "network"],
)
def test_what_the_server_refuses_is_told_with_a_way_out(server, bucket, fault, said):
    server.faults.append(fault)
    with pytest.raises(ObjectStoreError, match=said) as raised:
        bucket.check_writable()
    server.faults.clear()
    assert bucket.url in str(raised.value) and "\n" not in str(raised.value)


def test_a_missing_bucket_is_no_missing_object(bucket):
    other = Bucket("s3://nosuch/prefix")
    for request in (other.check_writable, lambda: other.get("a"), lambda: other.list("a")):
        with pytest.raises(ObjectStoreError, match=r"there is no bucket 'nosuch'; make it, or correct cache.root"):
            request()


def test_missing_credentials_are_told_with_how_to_give_them(bucket, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(ObjectStoreError, match="no credentials were found; set AWS_ACCESS_KEY_ID"):
        bucket.list("a")


def test_the_missing_library_is_told_with_the_extra_that_has_it(bucket, monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    for request in (bucket.check_writable, lambda: bucket.get("a")):
        with pytest.raises(ObjectStoreError, match=r"pip install 'jepa-cache\[objects\]'"):
            request()


@pytest.mark.parametrize(
    "url", ["s3://", "s3:/bucket", "az://bucket/x", "s3://key@bucket/x", "s3://bucket/x?y=1", "s3://b c/x"]
)
def test_what_is_no_bucket_is_refused(url):
    with pytest.raises(ObjectStoreError, match="s3://bucket/prefix or gs://bucket/prefix; got"):
        Bucket(url)


def test_only_uploads_that_nobody_has_touched_for_a_day_are_abandoned():
    now = datetime.now(UTC)
    old, young = now - timedelta(hours=25), now - timedelta(hours=23)
    named, dead, alive = (f"tokens/f/{'0' * 32}.zarr.attempt-{digit * 16}" for digit in "123")
    listing = {
        f"tokens/f/{'0' * 32}.zarr.commit.json": StoredObject(9, "t", old),
        f"{named}/store.json": StoredObject(5, "t", old),
        f"{dead}/store.json": StoredObject(3, "t", old),
        f"{dead}/tokens/c/0/0/0": StoredObject(4, "t", old),
        f"{alive}/store.json": StoredObject(5, "t", old),
        f"{alive}/tokens/c/0/0/0": StoredObject(5, "t", young),
        "tokens/model.attempt-2/weights": StoredObject(5, "t", old),  # somebody else's
        f"tokens/model/{'0' * 32}.attempt-2/weights": StoredObject(5, "t", old),
    }
    assert commits.find_abandoned(listing, [named]) == {dead: 7}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)


def kept_bytes(cache):
    return sum(path.stat().st_size for path in cache.folder.iterdir())


def test_any_range_in_any_pieces_is_what_was_stored(bucket, tmp_path, small_blocks):
    rng, data = np.random.default_rng(0), os.urandom(10_437)
    bucket.put("a", data)
    file = RemoteFile(bucket, "a", len(data), BlockCache(tmp_path / "blocks", 4000))
    for _ in range(60):
        begin = int(rng.integers(0, len(data)))
        pieces = [memoryview(bytearray(int(size))) for size in rng.integers(0, 2500, rng.integers(1, 5))]
        wanted = data[begin : begin + sum(map(len, pieces))]
        assert file.readv(pieces, begin) == len(wanted)
        assert b"".join(piece.tobytes() for piece in pieces)[: len(wanted)] == wanted
    assert file.readv([memoryview(bytearray(5))], len(data)) == 0


def test_what_was_read_is_not_asked_for_again(server, bucket, tmp_path, small_blocks):
    data = os.urandom(5000)
    bucket.put("a", data)
    server.requests.clear()
    for _ in range(2):  # the second time from the folder, as another process does
        file = RemoteFile(bucket, "a", 5000, BlockCache(tmp_path / "blocks", 1 << 20))
        for _ in range(2):
            piece = memoryview(bytearray(3000))
            assert file.readv([piece], 500) == 3000 and piece == data[500:3500]
    assert sum(request.startswith("GET") and request.endswith("/a") for request in server.requests) == 1


def test_the_kept_blocks_stay_within_the_bound_and_the_oldest_go_first(tmp_path):
    cache = BlockCache(tmp_path / "blocks", 10 * 1004)
    for block in range(40):
        cache.put("a", block, memoryview(bytes([block]) * 1000))
        os.utime(cache.folder / f"a-{block}", ns=(block, block))  # as if time went by
        if block > 3:
            assert cache.get("a", 3, 1000) is not None, "used again and again"
        assert kept_bytes(cache) <= cache.max_bytes
    assert len(list(cache.folder.iterdir())) >= 8 and cache.get("a", 39, 1000) == bytes([39]) * 1000
    assert cache.get("a", 4, 1000) is None


def test_a_bound_of_nothing_keeps_nothing(bucket, tmp_path):
    bucket.put("a", b"123")
    cache, piece = BlockCache(tmp_path / "blocks", 0), memoryview(bytearray(3))
    assert RemoteFile(bucket, "a", 3, cache).readv([piece], 0) == 3 and piece.tobytes() == b"123"
    assert not cache.folder.exists()


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "zeros"])
def test_a_damaged_block_is_fetched_again(bucket, tmp_path, damage):
    bucket.put("a", b"x" * 500)
    cache = BlockCache(tmp_path / "blocks", 1 << 20)
    file = RemoteFile(bucket, "a", 500, cache)

    def read(file):
        piece = memoryview(bytearray(500))
        return file.readv([piece], 0), piece.tobytes()

    whole = read(file)
    (path,) = cache.folder.iterdir()
    content = path.read_bytes()
    changed = {"flip": b"y" + content[1:], "cut": content[:-9], "empty": b"", "zeros": bytes(len(content))}
    path.write_bytes(changed[damage])
    if damage in ("cut", "empty"):
        assert read(file) == whole
        path.write_bytes(changed[damage])
    assert read(RemoteFile(bucket, "a", 500, cache)) == whole == (500, b"x" * 500)  # as the next process
    assert path.read_bytes() == content


def test_what_writers_that_died_left_behind_is_removed_and_what_is_being_written_is_not(tmp_path):
    cache = BlockCache(tmp_path / "blocks", 3 * 1004)
    cache.put("a", 0, memoryview(bytes(1000)))
    dead, alive = cache.folder / ".jepa-cache-0123456789ab-dead", cache.folder / ".jepa-cache-0123456789ab-alive"
    for path, age_s in ((dead, 7200), (alive, 60)):
        path.write_bytes(bytes(900))
        os.utime(path, (time.time() - age_s,) * 2)
    for block in range(1, 4):
        cache.put("a", block, memoryview(bytes(1000)))
    assert alive.exists() and not dead.exists()


def test_a_full_disk_is_named_and_leaves_no_part_behind(tmp_path, monkeypatch):
    cache = BlockCache(tmp_path / "blocks", 1 << 20)
    cache.put("a", 0, memoryview(b"1"))

    def fail(data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(google_crc32c, "value", fail)  # between the data and its checksum
    with pytest.raises(OSError, match="No space left") as raised:
        cache.put("a", 1, memoryview(b"2"))
    assert "JEPA_CACHE_LOCAL_GB" in raised.value.__notes__[0]
    assert [path.name for path in cache.folder.iterdir()] == ["a-0"]


@pytest.mark.parametrize("change", ["gone", "shorter"])
def test_an_object_that_is_not_what_it_was_is_damage(bucket, tmp_path, change):
    bucket.put("a", b"123")
    file = RemoteFile(bucket, "a", 3, BlockCache(tmp_path / "blocks", 1 << 20))
    bucket.delete(["a"]) if change == "gone" else bucket.put("a", b"12")
    with pytest.raises(StoreDamagedError, match=rf"{bucket.url}/a"):
        file.readv([memoryview(bytearray(3))], 0)
    with pytest.raises(StoreDamagedError, match=rf"{bucket.url}/a"):
        file.digest()


def test_threads_read_the_same_file(bucket, tmp_path, small_blocks):
    data = os.urandom(20_000)
    bucket.put("a", data)
    file, wrong = RemoteFile(bucket, "a", len(data), BlockCache(tmp_path / "blocks", 6000)), []

    def read(seed):
        rng = np.random.default_rng(seed)
        for begin in rng.integers(0, 18_000, 20):
            piece = memoryview(bytearray(1500))
            file.readv([piece], int(begin))
            if piece.tobytes() != data[begin : begin + 1500]:
                wrong.append(begin)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
