"""Claims of media/bucket.py, against a local server: a bucket's files are listed whole, fetched once, and read in part where asked.

A version is a file of its own; what is kept has a bound; what the server says is checked.
"""

import base64
import hashlib

import google_crc32c
import numpy as np
import pytest

from jepa_cache.media import bucket as bucket_module
from jepa_cache.media.bucket import downloads_folder, find_file, list_files
from jepa_cache.media.http import DownloadError
from jepa_cache.store.digests import DigestTable
from tests.media.fake_bucket import serve_bucket

DATA = np.random.default_rng(0).integers(0, 256, 300_000).astype(np.uint8).tobytes()


@pytest.fixture
def bucket():
    with serve_bucket() as running:
        running.files = {f"sets/one/{name}": name.encode() for name in "abcd"}
        running.files |= {"sets/one/deep/er/f": b"f", "sets/one-more/x": b"x", "sets/one/big": DATA, "sets/one/": b""}
        yield running


def test_a_folder_is_listed_over_all_its_pages_and_nothing_beside_it(bucket):
    files = list_files("gs://data/sets/one")
    assert [str(file) for file in files] == [
        f"gs://data/sets/one/{name}" for name in ("a", "b", "big", "c", "d", "deep/er/f")
    ]
    assert files[2].stat() == (len(DATA), 7)
    assert list_files("gs://data/sets/one/") == files
    assert list_files("gs://data/sets/one/a") == files[:1]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("gs://data", "names no folder"),
        ("s3://data/x", "names no folder"),
        ("gs://data/sets/on", "there is nothing there"),
        ("gs://other/sets", "answers 404"),
    ],
)
def test_what_cannot_be_listed_is_named(bucket, url, words):
    with pytest.raises(ValueError, match=words):
        list_files(url)


def test_a_listing_without_end_is_given_up(bucket, monkeypatch):
    monkeypatch.setattr(bucket_module, "MAX_PAGES", 2)
    with pytest.raises(ValueError, match="more than 2000 files"):
        list_files("gs://data/sets/one")


@pytest.mark.parametrize("answer", [b"[]", b"{", b'{"items": [{"name": "sets/one/a"}]}', b'{"items": [7]}'])
def test_an_answer_that_is_no_listing_is_refused(bucket, answer):
    bucket.server.find = lambda path: answer
    with pytest.raises(DownloadError):
        list_files("gs://data/sets/one")


def test_an_opened_file_is_fetched_once_and_continued_after_a_drop(bucket):
    (file,) = list_files("gs://data/sets/one/big")
    bucket.server.faults[bucket.media("sets/one/big")] = [("drop", 100_000), ("status", 503)]
    for _ in range(2):
        with file.open("rb") as opened:
            assert opened.read() == DATA
    assert bucket.fetched("sets/one/big") == [None, "bytes=100000-", "bytes=100000-"]


def test_a_new_version_is_another_file(bucket):
    old = find_file("data", "sets/one/a")
    assert old.open("rb").read() == b"a"
    bucket.files["sets/one/a"], bucket.generations["sets/one/a"] = b"A", 8
    new = old.with_name("a")
    assert new != old and new.stat().st_mtime_ns == 8
    assert (new.open("rb").read(), old.open("rb").read()) == (b"A", b"a")


def test_a_stream_asks_for_no_more_than_is_read(bucket, monkeypatch):
    monkeypatch.setattr(bucket_module, "STREAM_BYTES", 1000)
    (file,) = list_files("gs://data/sets/one/big")
    bucket.server.faults[bucket.media("sets/one/big")] = [("drop", 10)]
    with file.stream() as opened:
        assert opened.read(1500) == DATA[:1500]
        opened.seek(-5, 2)
        assert opened.read() == DATA[-5:]
    ranges = bucket.fetched("sets/one/big")
    assert ranges[:2] == ["bytes=0-999", "bytes=10-999"]
    assert all(int(text.partition("-")[2]) < 3000 for text in ranges[2:-1])
    assert not list(downloads_folder().glob("*/*"))


def test_a_server_that_serves_no_parts_cannot_be_streamed(bucket):
    bucket.server.faults[bucket.media("sets/one/big")] = [("no_ranges",)]
    with pytest.raises(DownloadError, match="asked for a part"), find_file("data", "sets/one/big").stream() as opened:
        opened.read(1)


def test_what_was_used_longest_ago_makes_room(bucket, monkeypatch):
    monkeypatch.setattr(bucket_module, "MAX_KEPT_BYTES", 3)
    files = {name: find_file("data", f"sets/one/{name}") for name in "abcd"}
    for name in "abcac":
        files[name].open("rb").close()
    files["d"].open("rb").close()
    kept = {path.name for path in downloads_folder().glob("*/*") if path.name != ".lock"}
    assert kept == {"a", "c", "d"}
    assert files["b"].open("rb").read() == b"b"


def test_a_disk_without_room_is_told_before_anything_is_fetched(bucket, monkeypatch):
    monkeypatch.setattr(bucket_module, "SPARE_BYTES", 1 << 62)
    with pytest.raises(DownloadError, match="JEPA_DOWNLOADS"):
        find_file("data", "sets/one/a").open("rb")
    assert bucket.fetched("sets/one/a") == []


def test_a_file_of_another_size_than_listed_is_refused(bucket):
    bucket.sizes["sets/one/big"] = 5
    with pytest.raises(DownloadError, match="other than the 5 bytes"):
        find_file("data", "sets/one/big").open("rb")
    assert not list(downloads_folder().glob("*/big*"))


@pytest.mark.parametrize("kind", ["md5", "crc32c"])
def test_bytes_that_do_not_fit_googles_checksum_are_refused(bucket, kind):
    checksum = google_crc32c.Checksum(DATA).digest() if kind == "crc32c" else hashlib.md5(DATA).digest()
    path = bucket.media("sets/one/big")
    bucket.server.headers[path] = {"x-goog-hash": f"{kind}={base64.b64encode(checksum).decode()}"}
    assert find_file("data", "sets/one/big").open("rb").read() == DATA
    bucket.files["sets/one/a"] = DATA[::-1]
    bucket.server.headers[bucket.media("sets/one/a")] = bucket.server.headers[path]
    with pytest.raises(DownloadError, match=f"its {kind}|its MD5"):
        find_file("data", "sets/one/a").open("rb")


def test_a_digest_is_of_the_content_and_remembered_by_version(bucket, tmp_path):
    table = DigestTable(tmp_path)
    (file,) = list_files("gs://data/sets/one/big")
    for _ in range(2):
        assert table.digest(file) == hashlib.sha256(DATA).hexdigest()
    for path in downloads_folder().glob("*/*"):
        path.unlink()
    assert table.digest(list_files("gs://data/sets/one/big")[0]) == hashlib.sha256(DATA).hexdigest()
    assert len(bucket.fetched("sets/one/big")) == 1
    bucket.files["sets/one/big"], bucket.generations["sets/one/big"] = DATA[1:], 8
    assert table.digest(find_file("data", "sets/one/big")) == hashlib.sha256(DATA[1:]).hexdigest()
