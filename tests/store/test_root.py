"""Claims: the cache root is found as documented, and what dead writers left in it is removed and nothing else."""

from pathlib import Path

import pytest

from jepa_cache.files import temporary_folder
from jepa_cache.store.root import CacheRoot, resolve_cache_root


def test_params_win_over_the_environment_and_that_over_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("JEPA_CACHE_HOME", str(tmp_path / "variable"))
    assert resolve_cache_root("here", tmp_path / "base").path == tmp_path / "base/here"
    assert resolve_cache_root(str(tmp_path / "there"), tmp_path / "base").path == tmp_path / "there"
    assert resolve_cache_root(None, tmp_path).path == tmp_path / "variable"
    monkeypatch.delenv("JEPA_CACHE_HOME")
    assert resolve_cache_root(None, tmp_path).path == tmp_path / "home/.cache/jepa-cache"
    assert resolve_cache_root("~/mine", tmp_path).path == tmp_path / "home/mine"


def test_a_url_that_is_no_object_store_is_refused():
    with pytest.raises(ValueError, match=r"s3://bucket/prefix or gs://bucket/prefix; got 'ftp://bucket/x'"):
        resolve_cache_root("ftp://bucket/x", Path())


def test_places_follow_from_fingerprint_and_digest_alone():
    root = CacheRoot(Path("/r"))
    digest = "0123456789abcdef" * 4
    assert root.tokens("fp", digest) == Path("/r/tokens/fp/0123456789abcdef0123456789abcdef.zarr")
    assert root.controls("fp", digest) == Path("/r/controls/fp/0123456789abcdef0123456789abcdef.parquet")
    assert root.actions("fp", digest) == Path("/r/actions/fp/0123456789abcdef0123456789abcdef.zarr")
    assert root.manifest("d") == Path("/r/manifests/d.json")


def test_a_root_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written.*JEPA_CACHE_HOME"):
        CacheRoot(tmp_path / "file" / "root").check_writable()
    CacheRoot(tmp_path / "new" / "root").check_writable()
    assert list((tmp_path / "new" / "root").iterdir()) == []


def test_what_dead_writers_left_anywhere_below_the_root_is_removed_and_nothing_else(tmp_path):
    root = CacheRoot(tmp_path)
    left = [
        ".tmp-0-README.md",
        "tokens/fp/.tmp-1-u.zarr/x",
        "controls/fp/.tmp-2-u.parquet",
        "manifests/.tmp-3-m.json",
        "actions/fp/.tmp-u.zarr.claim",
    ]
    kept = ["tokens/fp/u.zarr/tokens/c/0", "controls/fp/u.parquet", "manifests/m.json", "other/file"]
    for name in left + kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    with temporary_folder(root.tokens("fp", "v" * 32)) as living, root.claimed(root.actions("fp", "w" * 32)):
        root.remove_stale_temporaries()
        assert living.is_dir() and root.is_claimed(root.actions("fp", "w" * 32))
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)


@pytest.mark.parametrize("url", ["s3:/bucket/prefix", "http://bucket/prefix", "s3:///prefix"])
def test_a_mistyped_url_is_no_folder(tmp_path, url):
    with pytest.raises(ValueError, match=r"named s3://bucket/prefix or gs://bucket/prefix; got"):
        resolve_cache_root(url, tmp_path)
