"""Claims of sources/parsers/vpt_downloads.py and stages/fetch_vpt.py, against a local server.

An index is not trusted; bytes are estimated before any is downloaded; what cannot be fetched is named and the others are; an
interrupted command resumes; a tar shard that is there is never downloaded again nor rewritten.
"""

import hashlib
import json
import runpy

import pytest

from jepa_cache.config.loading import REPOSITORY_ROOT
from jepa_cache.media.remote import DownloadError
from jepa_cache.sources import build_source
from jepa_cache.sources.parsers import vpt_downloads as command
from jepa_cache.sources.parsers.vpt_downloads import read_index
from tests.makers import make_vpt_pair
from tests.media.fake_bucket import serve

PAIRS = {f"data/10.0/cheeky-setter-02e4-2022042{number}-0926": make_vpt_pair(4, number) for number in range(4)}
KEYS = [name.removeprefix("data/") for name in PAIRS]


@pytest.fixture
def server():
    with serve() as running:
        for name, (video, lines) in PAIRS.items():
            running.files |= {f"rl/{name}.mp4": video, f"rl/{name}.jsonl": lines}
        index = {"basedir": f"{running.url}/rl/", "relpaths": [f"{name}.mp4" for name in PAIRS]}
        running.files["index.json"] = json.dumps(index).encode()
        yield running


@pytest.fixture
def fetch(server, tmp_path):
    """The stage, as it is typed, with the index of the server; fetches into `out`."""

    def run(*argv, out=tmp_path / "out"):
        stage = runpy.run_path(str(REPOSITORY_ROOT / "stages/fetch_vpt.py"))
        stage["main"]([f"{server.url}/index.json", "--out", str(out), *map(str, argv)])

    return run


def _keys(out):
    source = build_source("vpt", {})
    return sorted(episode.key for unit in source.list_units([str(out)], out) for episode in source.iter_episodes(unit))


def _tars(out):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*.tar")}


def _write_index(folder, basedir, *relpaths):
    path = folder / "index.json"
    path.write_text(json.dumps({"basedir": basedir, "relpaths": relpaths}))
    return str(path)


def test_an_index_gives_keys_with_the_recorder_version_and_addresses_below_its_base(server, tmp_path):
    recordings = read_index(f"{server.url}/index.json", tmp_path / "staging")
    assert recordings == {key: f"{server.url}/rl/data/{key}" for key in KEYS}
    (tmp_path / "index.json").write_bytes(server.files["index.json"])
    assert read_index(str(tmp_path / "index.json"), tmp_path) == recordings
    twice = _write_index(tmp_path, "http://h", "a/10.0/x.mp4", "a/10.0/x.mp4", "d/6.9/x.part2.mp4")
    assert read_index(twice, tmp_path) == {"10.0/x": "http://h/a/10.0/x", "6.9/x_part2": "http://h/d/6.9/x.part2"}
    with pytest.raises(ValueError, match="two recordings"):
        read_index(_write_index(tmp_path, "http://h", "a/10.0/x.mp4", "b/10.0/x.mp4"), tmp_path)
    with pytest.raises(DownloadError, match="there is nothing there"):
        read_index(f"{server.url}/none.json", tmp_path)


OUTSIDE = ["../../e.mp4", "data/../../x.mp4", "/etc/x.mp4", "//evil/x.mp4", "http://evil/x.mp4", "@evil/x.mp4"]
ODD = [
    "data/x#y.mp4",
    "data/x.mp4?y=.mp4",
    "data\\..\\x.mp4",
    "data/%2e%2e/x.mp4",
    "data/.hidden/x.mp4",
    "data/./x.mp4",
]
ODD += ["data//x.mp4", "data/x\n.mp4", "data/x.tar", ".mp4", "", 7, None]
BASES = ["file:///etc", "ftp://host/", "https://user@host/", "https:///x", "/local", "", None]
OTHERS = [b"{", b"[]", b"{}", b"null", b'{"basedir": "http://h/", "relpaths": []}', b"[" * 10**5, None]


@pytest.mark.parametrize(
    ("index", "words"),
    [
        *((("https://host/rl/", "data/10.0/good.mp4", path), "plain relative paths") for path in (*OUTSIDE, *ODD)),
        *(((base, "data/x.mp4"), "basedir") for base in BASES),
        *((content, "index.json") for content in OTHERS),
    ],
)
def test_an_index_that_is_none_or_could_leave_its_place_is_refused_by_name(tmp_path, index, words):
    if isinstance(index, tuple):
        _write_index(tmp_path, *index)
        words = words if words == "basedir" else repr(index[-1])[1:20]
    elif index is not None:
        (tmp_path / "index.json").write_bytes(index)
    with pytest.raises(ValueError) as caught:
        read_index(str(tmp_path / "index.json"), tmp_path)
    assert words in str(caught.value)


def test_bytes_are_estimated_before_any_is_downloaded(server, fetch, tmp_path, capsys, monkeypatch):
    fetch("--num", 3, "--start", 1, "--dry-run")
    output = capsys.readouterr().out
    assert "4 recordings in the index, 3 chosen, 0 at hand" in output and "from the sizes of 3 recordings" in output
    assert not _tars(tmp_path / "out") and not [r for r in server.requests if r[0] == "GET" and r[1].startswith("rl")]
    monkeypatch.setattr(command.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(ValueError, match=r"are needed below .*lower --num"):
        fetch()


def test_fetched_recordings_are_read_by_the_source_in_full_shards(server, fetch, tmp_path, monkeypatch):
    fetch()
    assert _keys(tmp_path / "out") == KEYS and len(_tars(tmp_path / "out")) == 1
    assert not list((tmp_path / "out").rglob("*.mp4")), "downloads are removed when their shard is complete"
    monkeypatch.setattr(command, "MAX_TAR_BYTES", 1)
    fetch(out=tmp_path / "small")
    assert len(_tars(tmp_path / "small")) == 4 and _keys(tmp_path / "small") == KEYS


def test_what_cannot_be_fetched_is_named_the_others_are_and_the_next_run_gets_it(server, fetch, tmp_path, capsys):
    gone = server.files.pop(f"rl/data/{KEYS[1]}.jsonl")
    with pytest.raises(SystemExit, match="1 recordings could not be fetched"):
        fetch("--num", 3)
    assert f"failed: {KEYS[1]}: {server.url}/rl/data/{KEYS[1]}.jsonl: there is nothing" in capsys.readouterr().out
    assert _keys(tmp_path / "out") == [KEYS[0], KEYS[2]]
    server.files[f"rl/data/{KEYS[1]}.jsonl"] = gone
    before, num_requests = _tars(tmp_path / "out"), len(server.requests)
    fetch("--num", 4)
    assert "2 at hand" in capsys.readouterr().out and _keys(tmp_path / "out") == KEYS
    assert before.items() < _tars(tmp_path / "out").items(), "the first shard is as it was"
    assert not any(KEYS[0] in path for _, path, _ in server.requests[num_requests:])
    (tmp_path / "out/x.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match=r"x\.tar is no readable tar shard"):
        fetch()


@pytest.mark.parametrize("moment", ["write_tar", "_remove_staged"])
def test_a_crash_between_download_and_shard_costs_nothing(server, fetch, tmp_path, monkeypatch, moment):
    def crash(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, moment, crash)
    with pytest.raises(KeyboardInterrupt):
        fetch()
    monkeypatch.undo()
    num_requests = len(server.requests)
    fetch()
    again = [path for method, path, _ in server.requests[num_requests:] if method == "GET"]
    assert again == ["index.json"], "nothing is downloaded twice"
    assert _keys(tmp_path / "out") == KEYS and not list((tmp_path / "out").rglob("*.mp4"))
