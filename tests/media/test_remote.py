"""Claims of media/remote.py, against a local server: a file appears when it is whole, a bucket is listed whole, room is bounded.

What cannot be fetched is one message with the reason and the way out.
"""

import hashlib
import pathlib

import numpy as np
import pytest

from jepa_cache.media import remote
from jepa_cache.media.remote import DownloadError, downloads_folder, fetch_file, fetch_hub_dataset, list_files
from jepa_cache.store.digests import DigestTable
from tests.media.fake_bucket import serve

DATA = np.random.default_rng(0).integers(0, 256, 3_000_000).astype(np.uint8).tobytes()
BIG = "data/sets/one/big"


@pytest.fixture
def server():
    with serve() as running:
        running.files = {f"data/sets/one/{name}": name.encode() for name in "abcd"}
        running.files |= {BIG: DATA, "data/sets/one/deep/er/f": b"f", "data/sets/one-more/x": b"x"}
        yield running


@pytest.mark.parametrize("faults", [[], [("drop", 100_000)], [("drop", 9), ("status", 503), ("drop", 100_000)]])
def test_a_file_arrives_whole_whatever_the_connection_does_and_is_not_asked_for_again(server, tmp_path, faults):
    server.faults[BIG] = list(faults)
    path = tmp_path / "out/f"
    assert fetch_file(f"{server.url}/{BIG}", path) == len(DATA)
    assert path.read_bytes() == DATA and [file.name for file in path.parent.iterdir()] == ["f"]
    num_requests = len(server.requests)
    assert fetch_file(f"{server.url}/{BIG}", path) == len(DATA) and len(server.requests) == num_requests


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("{}/gone", "/gone: there is nothing there"),
        ("{}/forbidden", "cannot be fetched .*403.*https_proxy"),
        ("{}/broken", "cannot be fetched .*500"),
        ("{}/short", "cannot be fetched .*GenericError"),
        ("http://127.0.0.1:9/f", "cannot be fetched .*Is the network reachable"),
        ("file:///etc/passwd", "only http"),
        ("ftp://127.0.0.1/f", "only http"),
        ("{}/" + BIG, "has 3000000 bytes; at most 1000"),
    ],
)
def test_what_cannot_be_fetched_is_named_with_the_reason(server, tmp_path, monkeypatch, url, words):
    monkeypatch.setattr(remote, "RETRIES", {"max_retries": 1})
    monkeypatch.setattr(remote, "MAX_FILE_BYTES", 1000)
    server.files |= {"forbidden": b"", "broken": b"", "short": bytes(900)}
    server.faults |= {"forbidden": [("status", 403)] * 9, "broken": [("status", 500)] * 9}
    server.faults["short"] = [("drop", 400)] * 9
    with pytest.raises(DownloadError, match=words):
        fetch_file(url.format(server.url), tmp_path / "f")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_no_network_trouble(server, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "open", full)
    with pytest.raises(OSError, match="No space"):
        fetch_file(f"{server.url}/{BIG}", tmp_path / "f")


def test_a_folder_of_a_bucket_is_listed_over_all_its_pages_and_nothing_beside_it(server, monkeypatch):
    files = list_files("gs://data/sets/one")
    names = ("a", "b", "big", "c", "d", "deep/er/f")
    assert [str(file) for file in files] == [f"gs://data/sets/one/{name}" for name in names]
    assert files[2].stat().st_size == len(DATA) and list_files("gs://data/sets/one/") == files
    assert list_files("gs://data/sets/one/a") == files[:1]
    monkeypatch.setattr(remote, "MAX_FILES", 3)
    for url, words in (
        ("gs://data/sets/one", "more than 3 files"),
        ("gs://data", "names no folder"),
        ("s3://data/x", "names no folder"),
        ("gs://data/sets/on", "there is nothing there"),
        ("gs://other/sets", "there is nothing there"),
    ):
        with pytest.raises(ValueError, match=words):
            list_files(url)


def test_a_file_is_fetched_once_and_a_new_version_is_another_file_with_another_digest(server, tmp_path):
    table, old = DigestTable(tmp_path), list_files("gs://data/sets/one/a")[0]
    assert [table.digest(old), table.digest(old)] == [hashlib.sha256(b"a").hexdigest()] * 2
    server.files["data/sets/one/a"] = b"A"
    new = old.with_name("a")
    assert new != old and table.digest(new) == hashlib.sha256(b"A").hexdigest()
    assert [file.open("rb").read() for file in (new, old, new)] == [b"A", b"a", b"A"]
    assert server.gets("data/sets/one/a") == [None, None]


def test_a_file_of_another_size_than_listed_is_refused(server):
    server.sizes["sets/one/big"] = 5
    (file,) = (file for file in list_files("gs://data/sets/one") if file.name == "big")
    with pytest.raises(DownloadError, match="other than the 5 bytes"):
        file.open("rb")
    assert not list(downloads_folder().glob("*/big*"))


def test_what_was_used_longest_ago_makes_room_and_a_full_disk_is_told_before_the_download(server, monkeypatch):
    monkeypatch.setattr(remote, "MAX_KEPT_BYTES", 3)
    files = {file.name: file for file in list_files("gs://data/sets/one")}
    for name in "abcacd":
        files[name].open("rb").close()
    assert {path.name for path in downloads_folder().glob("*/[!.]*")} == {"a", "c", "d"}
    assert files["b"].open("rb").read() == b"b"
    monkeypatch.setattr(remote, "SPARE_BYTES", 1 << 62)
    with pytest.raises(DownloadError, match="JEPA_DOWNLOADS"):
        files["big"].open("rb")
    assert not server.gets(BIG)


def test_a_data_set_of_the_hub_that_cannot_be_fetched_says_how_to_fetch_it_elsewhere(monkeypatch):
    with pytest.raises(DownloadError, match=r"data set \.\./b of the hub cannot be fetched \(HFValidationError"):
        fetch_hub_dataset("hub:../b", [])

    def offline(*_, **__):
        raise ConnectionError("no route to host\ntrace")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(DownloadError, match=r"no route to host.*hf download --repo-type dataset a/b --local-dir DIR"):
        fetch_hub_dataset("hub:a/b@main", ["meta/*"])
