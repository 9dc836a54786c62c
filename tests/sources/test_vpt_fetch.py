"""Claims of sources/_vpt_fetch.py and stages/fetch_vpt.py, against a local server.

An index is not trusted; bytes are estimated before any is downloaded; what cannot be had is named and the others go on; an
interrupted fetch goes on; a tar shard that is there is never downloaded again nor rewritten.
"""

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest

from jepa_cache.episode import Episode
from jepa_cache.media.download import DownloadError
from jepa_cache.sources import _vpt_fetch as fetch
from jepa_cache.sources import build_source
from tests.makers import make_vpt_pair
from tests.media.flaky_server import serve

PAIRS = {f"data/10.0/cheeky-setter-02e4-2022042{number}-0926": make_vpt_pair(4, number) for number in range(4)}
KEYS = [name.removeprefix("data/") for name in PAIRS]


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serve() as running:
        for name, (video, lines) in PAIRS.items():
            running.files |= {f"/rl/{name}.mp4": video, f"/rl/{name}.jsonl": lines, f"/rl/{name}-options.json": b"{}"}
        index = {"basedir": f"{running.url}/rl/", "relpaths": [f"{name}.mp4" for name in PAIRS]}
        running.files["/index.json"] = json.dumps(index).encode()
        yield running


@pytest.fixture
def recordings(server, tmp_path):
    return fetch.read_index(f"{server.url}/index.json", tmp_path / "staging")


def _fetch(recordings, out, **options):
    return fetch.fetch_recordings(recordings, out, say=lambda _: None, sleep=lambda _: None, **options)


def _episodes(out):
    source = build_source("vpt", {})
    return [episode for unit in source.list_units([str(out)], out) for episode in source.iter_episodes(unit)]


def _tars(out):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*.tar")}


def _run_stage(*argv):
    path = Path(__file__).resolve().parents[2] / "stages/fetch_vpt.py"
    spec = importlib.util.spec_from_file_location("fetch_vpt", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(argument) for argument in argv])


def test_an_index_gives_keys_with_the_recorder_version_and_urls_below_basedir(server, recordings):
    assert [recording.key for recording in recordings] == KEYS
    assert recordings[0].urls["jsonl"] == f"{server.url}/rl/data/{KEYS[0]}.jsonl"
    assert recordings[0].urls["options"] == f"{server.url}/rl/data/{KEYS[0]}-options.json"


def test_an_index_may_be_a_file(server, recordings, tmp_path):
    (tmp_path / "index.json").write_bytes(server.files["/index.json"])
    assert fetch.read_index(str(tmp_path / "index.json"), tmp_path) == recordings


@pytest.mark.parametrize(
    "relpath",
    [
        "../../etc/passwd.mp4",
        "data/../../x.mp4",
        "/etc/x.mp4",
        "//evil.example/x.mp4",
        "http://evil.example/x.mp4",
        "@evil.example/x.mp4",
        "data/x.mp4?y=.mp4",
        "data/x#y.mp4",
        "data\\..\\x.mp4",
        "data/%2e%2e/x.mp4",
        "data/.hidden/x.mp4",
        "data/./x.mp4",
        "data//x.mp4",
        "data/x\n.mp4",
        "data/x.tar",
        ".mp4",
        "",
        7,
        None,
    ],
)
def test_a_path_that_could_leave_its_place_is_refused_by_name(tmp_path, relpath):
    place = tmp_path / "index.json"
    place.write_text(json.dumps({"basedir": "https://host/rl/", "relpaths": ["data/10.0/good.mp4", relpath]}))
    with pytest.raises(ValueError, match="plain relative path") as error:
        fetch.read_index(str(place), tmp_path)
    assert repr(relpath)[1:20] in str(error.value)


@pytest.mark.parametrize(
    "basedir", ["file:///etc", "ftp://host/", "https://user@host/", "https:///x", "/local", "", None]
)
def test_a_base_that_is_no_plain_web_address_is_refused(tmp_path, basedir):
    place = tmp_path / "index.json"
    place.write_text(json.dumps({"basedir": basedir, "relpaths": ["data/x.mp4"]}))
    with pytest.raises(ValueError, match="basedir"):
        fetch.read_index(str(place), tmp_path)


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"{}", b"null", b'{"basedir": "http://h/", "relpaths": []}', b"[" * 10**5]
)
def test_what_is_no_index_is_refused(tmp_path, content):
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"index\.json"):
        fetch.read_index(str(tmp_path / "index.json"), tmp_path)


def test_two_recordings_of_one_key_are_refused_and_one_named_twice_is_one(tmp_path):
    place = tmp_path / "index.json"
    place.write_text(json.dumps({"basedir": "http://h", "relpaths": ["a/10.0/x.mp4", "a/10.0/x.mp4"]}))
    assert len(fetch.read_index(str(place), tmp_path)) == 1
    place.write_text(json.dumps({"basedir": "http://h", "relpaths": ["a/10.0/x.mp4", "b/10.0/x.mp4"]}))
    with pytest.raises(ValueError, match="two recordings"):
        fetch.read_index(str(place), tmp_path)


def test_a_dot_in_a_segment_stays_in_its_url_and_leaves_its_key(tmp_path):
    place = tmp_path / "index.json"
    place.write_text(json.dumps({"basedir": "http://h", "relpaths": ["d/6.9/x.part2.mp4"]}))
    (recording,) = fetch.read_index(str(place), tmp_path)
    assert (recording.key, recording.urls["jsonl"]) == ("6.9/x_part2", "http://h/d/6.9/x.part2.jsonl")


def test_the_estimate_is_the_sum_of_all_sizes_when_all_are_asked_and_no_body_is_sent(server, recordings):
    estimate = fetch.estimate_bytes(recordings, ("mp4", "jsonl"))
    assert estimate.total_bytes == sum(len(video) + len(lines) for video, lines in PAIRS.values())
    assert (estimate.num_recordings, estimate.num_asked, estimate.failures) == (4, 4, [])
    assert not [request for request in server.requests[1:] if request[0] != "HEAD"]


def test_the_estimate_asks_a_few_and_names_what_is_not_there(server, recordings):
    del server.files[f"/rl/data/{KEYS[2]}.mp4"]
    estimate = fetch.estimate_bytes(recordings, ("mp4",), num_asked=2, sleep=lambda _: None)
    assert estimate.num_asked == 1 and [failure.key for failure in estimate.failures] == [KEYS[2]]
    assert estimate.total_bytes == 4 * len(PAIRS[f"data/{KEYS[0]}"][0])


def test_fetched_recordings_are_read_by_the_source(recordings, tmp_path):
    report = _fetch(recordings, tmp_path / "out")
    assert report.fetched == KEYS and report.failures == [] and len(report.tars) == 1
    episodes = {episode.key: episode for episode in _episodes(tmp_path / "out")}
    assert {key: episode.video for key, episode in episodes.items()} == {key: PAIRS[f"data/{key}"][0] for key in KEYS}
    assert all(isinstance(episode, Episode) for episode in episodes.values())
    assert not list((tmp_path / "out").rglob("*.mp4")), "downloads are removed when their shard is complete"


def test_connections_that_drop_change_nothing(server, recordings, tmp_path):
    _fetch(recordings, tmp_path / "calm")
    for path in list(server.files):
        server.faults[path] = [("drop", 200), ("status", 503), ("drop", 300), ("no_ranges",)]
    _fetch(recordings, tmp_path / "flaky")
    assert _tars(tmp_path / "flaky") == _tars(tmp_path / "calm")


def test_what_cannot_be_had_is_named_and_the_others_go_on(server, recordings, tmp_path):
    del server.files[f"/rl/data/{KEYS[1]}.jsonl"]
    report = _fetch(recordings, tmp_path / "out")
    (failure,) = report.failures
    assert failure.key == KEYS[1] and "404" in failure.reason and f"{KEYS[1]}.jsonl" in failure.reason
    assert report.fetched == [KEYS[0], *KEYS[2:]] == sorted(episode.key for episode in _episodes(tmp_path / "out"))


def test_more_recordings_make_more_shards_and_leave_the_old_ones_as_they_are(server, recordings, tmp_path):
    _fetch(recordings[:2], tmp_path / "out")
    before, num_requests = _tars(tmp_path / "out"), len(server.requests)
    report = _fetch(recordings, tmp_path / "out")
    assert (report.present, report.fetched) == (KEYS[:2], KEYS[2:])
    assert before.items() < _tars(tmp_path / "out").items() and len(_tars(tmp_path / "out")) == 2
    assert not any(key in path for _, path, _ in server.requests[num_requests:] for key in KEYS[:2])
    assert _fetch(recordings, tmp_path / "out").fetched == []


def test_a_shard_is_closed_when_it_is_full(recordings, tmp_path):
    report = _fetch(recordings, tmp_path / "out", max_tar_bytes=1)
    assert len(report.tars) == 4 and len(_episodes(tmp_path / "out")) == 4


@pytest.mark.parametrize("moment", ["packing", "removing"])
def test_a_crash_between_download_and_shard_costs_nothing(server, recordings, tmp_path, monkeypatch, moment):
    def crash(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, *(("pack_folder", crash) if moment == "packing" else ("_remove", crash)))
    with pytest.raises(KeyboardInterrupt):
        _fetch(recordings, tmp_path / "out")
    monkeypatch.undo()
    num_requests = len(server.requests)
    _fetch(recordings, tmp_path / "out")
    assert len(server.requests) == num_requests, "nothing is downloaded twice"
    assert sorted(episode.key for episode in _episodes(tmp_path / "out")) == KEYS
    assert not list((tmp_path / "out").rglob("*.mp4"))


def test_options_are_kept_beside_the_shards_when_asked_for(recordings, tmp_path):
    _fetch(recordings[:1], tmp_path / "out", options=True)
    assert (tmp_path / f"out/options/{KEYS[0]}-options.json").read_bytes() == b"{}"
    assert len(_episodes(tmp_path / "out")) == 1


def test_a_disk_that_is_too_small_is_told_before_the_download(tmp_path):
    with pytest.raises(ValueError, match=r"are needed below .*lower --num"):
        fetch.check_disk(tmp_path / "not/yet", 1 << 60)
    fetch.check_disk(tmp_path / "not/yet", 1000)


def test_a_damaged_shard_in_the_output_is_named(recordings, tmp_path):
    (tmp_path / "x.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match=r"x\.tar is no readable tar shard"):
        _fetch(recordings, tmp_path)


def test_an_index_that_is_not_there_is_named(server, tmp_path):
    with pytest.raises(ValueError, match="no index file"):
        fetch.read_index(str(tmp_path / "none.json"), tmp_path)
    with pytest.raises(DownloadError, match="404"):
        fetch.read_index(f"{server.url}/none.json", tmp_path)


def test_the_stage_estimates_without_downloading(server, tmp_path, capsys):
    _run_stage(f"{server.url}/index.json", "--num", 3, "--start", 1, "--out", tmp_path / "out", "--dry-run")
    output = capsys.readouterr().out
    assert "4 recordings in the index, 3 chosen, 0 at hand" in output and "from the sizes of 3 recordings" in output
    assert not _tars(tmp_path / "out")
    assert not [path for method, path, _ in server.requests if method == "GET" and path.startswith("/rl")]


def test_the_stage_fetches_names_what_failed_and_ends_with_an_error(server, tmp_path, capsys):
    del server.files[f"/rl/data/{KEYS[1]}.mp4"]
    with pytest.raises(SystemExit, match="1 recordings could not be had"):
        _run_stage(f"{server.url}/index.json", "--num", 2, "--out", tmp_path / "out")
    assert f"failed: {KEYS[1]}" in capsys.readouterr().out
    server.files[f"/rl/data/{KEYS[1]}.mp4"] = PAIRS[f"data/{KEYS[1]}"][0]
    _run_stage(f"{server.url}/index.json", "--num", 2, "--out", tmp_path / "out")
    assert "1 at hand" in capsys.readouterr().out
    assert sorted(episode.key for episode in _episodes(tmp_path / "out")) == KEYS[:2]
