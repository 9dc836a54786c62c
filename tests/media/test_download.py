"""Claims of media/download.py, against a local server: a file gets its name only when it is whole and of one version.

An interrupted download goes on where it ended; a changed file starts over; what cannot be had is named after a few attempts;
nothing is fetched from another host.
"""

import base64
import hashlib

import numpy as np
import pytest

from jepa_cache.media import download
from jepa_cache.media.download import DownloadError, download_file, probe_url
from tests.media.flaky_server import serve

DATA = np.random.default_rng(0).integers(0, 256, 300_000).astype(np.uint8).tobytes()
OTHER = DATA[::-1]


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serve() as running:
        running.files["/f"] = DATA
        yield running


@pytest.fixture
def pauses():
    return []


@pytest.fixture
def fetch(server, tmp_path, pauses):
    return lambda: download_file(f"{server.url}/f", tmp_path / "out" / "f", sleep=pauses.append)


def _files(tmp_path):
    return sorted(path.name for path in (tmp_path / "out").iterdir())


def test_a_file_arrives_whole_and_leaves_nothing_beside_it(server, fetch, tmp_path, pauses):
    assert fetch() == len(DATA)
    assert (tmp_path / "out/f").read_bytes() == DATA and _files(tmp_path) == ["f"] and pauses == []
    assert server.gets("/f") == [None]


def test_a_file_that_is_there_is_not_asked_for_again(server, fetch):
    fetch()
    assert fetch() == len(DATA) and len(server.requests) == 1


def test_a_dropped_connection_goes_on_where_it_ended(server, fetch, tmp_path, pauses):
    server.faults["/f"] = [("drop", 100_000), ("drop", 50_000), ("drop", 0)]
    fetch()
    assert server.gets("/f") == [None, "bytes=100000-", "bytes=150000-", "bytes=150000-"]
    assert (tmp_path / "out/f").read_bytes() == DATA and len(pauses) == 3


def test_a_connection_that_drops_again_and_again_but_brings_something_ends(server, fetch, tmp_path):
    server.faults["/f"] = [("drop", 20_000)] * 13
    fetch()
    assert len(server.gets("/f")) == 14 and (tmp_path / "out/f").read_bytes() == DATA


def test_a_killed_download_goes_on_in_the_next_run(server, tmp_path, fetch):
    server.faults["/f"] = [("drop", 120_000)]

    def killed(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download_file(f"{server.url}/f", tmp_path / "out/f", sleep=killed)
    assert _files(tmp_path) == ["f.part", "f.part.json"]
    fetch()
    assert server.gets("/f")[1:] == ["bytes=120000-"] and (tmp_path / "out/f").read_bytes() == DATA


def test_a_server_without_ranges_starts_over(server, fetch, tmp_path):
    server.faults["/f"] = [("drop", 100_000), ("no_ranges",)]
    fetch()
    assert (tmp_path / "out/f").read_bytes() == DATA


def test_a_file_that_changed_meanwhile_starts_over(server, fetch, tmp_path):
    server.faults["/f"] = [("drop", 100_000)]

    def change(_):
        server.files["/f"], server.etags["/f"] = OTHER, '"2"'

    download_file(f"{server.url}/f", tmp_path / "out/f", sleep=change)
    assert (tmp_path / "out/f").read_bytes() == OTHER


def test_a_file_that_became_shorter_than_the_part_starts_over(server, fetch, tmp_path):
    server.faults["/f"] = [("drop", 100_000)]

    def shrink(_):
        server.files["/f"] = DATA[:50_000]  # The server forgot to change its ETag.

    download_file(f"{server.url}/f", tmp_path / "out/f", sleep=shrink)
    assert (tmp_path / "out/f").read_bytes() == DATA[:50_000]


def test_without_a_validator_a_part_is_never_continued(server, fetch, tmp_path):
    server.etags["/f"] = None
    server.faults["/f"] = [("drop", 100_000)]
    fetch()
    assert server.gets("/f") == [None, None] and (tmp_path / "out/f").read_bytes() == DATA


def test_a_weak_etag_continues_nothing(server, fetch):
    server.etags["/f"] = 'W/"1"'
    server.faults["/f"] = [("drop", 100_000)]
    fetch()
    assert server.gets("/f") == [None, None]


def test_a_range_other_than_the_one_asked_for_starts_over(server, fetch, tmp_path):
    server.faults["/f"] = [("drop", 100_000), ("wrong_range",)]
    fetch()
    assert (tmp_path / "out/f").read_bytes() == DATA and server.gets("/f")[-1] is None


def test_the_part_of_another_url_is_not_continued(server, fetch, tmp_path):
    server.files["/g"] = OTHER
    server.faults["/g"] = [("drop", 100_000)] + [("status", 500)] * 9
    with pytest.raises(DownloadError):
        download_file(f"{server.url}/g", tmp_path / "out/f", sleep=lambda _: None)
    fetch()
    assert server.gets("/f") == [None] and (tmp_path / "out/f").read_bytes() == DATA


def test_half_a_note_is_as_good_as_none(server, fetch, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/f.part").write_bytes(OTHER[:1000])
    (tmp_path / "out/f.part.json").write_text('{"url": "ht')
    fetch()
    assert (tmp_path / "out/f").read_bytes() == DATA


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_server_that_recovers_is_waited_for_longer_each_time(server, fetch, tmp_path, pauses, status):
    server.faults["/f"] = [("status", status)] * 3
    fetch()
    assert (tmp_path / "out/f").read_bytes() == DATA and pauses == [1.0, 2.0, 4.0]


def test_a_server_that_does_not_recover_is_named_with_its_last_answer(server, fetch, tmp_path, pauses):
    server.faults["/f"] = [("status", 500)] * 99
    with pytest.raises(DownloadError, match=r"/f: given up after 6 attempts .*500"):
        fetch()
    assert len(pauses) == 5 and _files(tmp_path) == []


@pytest.mark.parametrize("status", [403, 404, 410])
def test_what_is_not_there_is_named_at_once(server, fetch, pauses, status):
    server.faults["/f"] = [("status", status)] * 9
    with pytest.raises(DownloadError, match=str(status)):
        fetch()
    assert pauses == []


def test_a_closed_port_is_named(tmp_path):
    with serve() as gone:
        url = gone.url
    with pytest.raises(DownloadError, match=r"given up after 6 attempts.*refused"):
        download_file(f"{url}/f", tmp_path / "f", sleep=lambda _: None)


def test_an_md5_that_does_not_fit_is_never_accepted(server, fetch, tmp_path):
    server.headers["/f"] = {"Content-MD5": base64.b64encode(hashlib.md5(OTHER).digest()).decode()}
    with pytest.raises(DownloadError, match="MD5"):
        fetch()
    assert _files(tmp_path) == []
    server.headers["/f"] = {"Content-MD5": base64.b64encode(hashlib.md5(DATA).digest()).decode()}
    assert fetch() == len(DATA)


def test_a_size_that_is_not_announced_is_refused(server, fetch):
    server.faults["/f"] = [("no_length",)]
    with pytest.raises(DownloadError, match="does not say how many bytes"):
        fetch()


def test_a_file_that_would_fill_the_disk_is_refused(server, fetch, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MAX_BYTES", 1000)
    with pytest.raises(DownloadError, match="has 300000 bytes; at most 1000"):
        fetch()
    assert not (tmp_path / "out/f.part").exists()


def test_compressed_answers_are_refused(server, fetch):
    server.headers["/f"] = {"Content-Encoding": "gzip"}
    with pytest.raises(DownloadError, match="compressed"):
        fetch()


def test_redirects_are_followed_on_the_same_host_only(server, fetch, tmp_path):
    server.files["/g"] = OTHER
    server.faults["/f"] = [("redirect", "/g")]
    fetch()
    assert (tmp_path / "out/f").read_bytes() == OTHER
    (tmp_path / "out/f").unlink()
    with serve() as elsewhere:
        elsewhere.files["/f"] = OTHER
        server.faults["/f"] = [("redirect", f"{elsewhere.url}/f")]
        with pytest.raises(DownloadError, match="another host"):
            fetch()
        assert elsewhere.requests == []


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/f"])
def test_only_http_is_downloaded(tmp_path, url):
    with pytest.raises(DownloadError, match="only http"):
        download_file(url, tmp_path / "f")


def test_a_full_disk_is_no_network_trouble(server, fetch, monkeypatch, pauses):
    import pathlib

    def full(self, mode="r", *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "open", full)
    with pytest.raises(OSError, match="No space"):
        fetch()
    assert pauses == []


def test_a_probe_tells_size_and_validator_without_the_body(server):
    assert probe_url(f"{server.url}/f") == (len(DATA), '"1"', None, None)
    assert [method for method, *_ in server.requests] == ["HEAD"]
