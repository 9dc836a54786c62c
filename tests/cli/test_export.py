"""Claims of `jepa-cache export cache`: a root of its own, every byte checked where it arrived; that stage two reads it, test_sharing.py holds.

It holds the manifest, a README with weights and licences (unknown where they are), and checksums of every file.
"""

import shutil
import subprocess

import pytest

from jepa_cache.cli.export import CHECKSUMS
from jepa_cache.config.loading import load_config
from jepa_cache.data.dataset import open_dataset
from jepa_cache.store.root import CacheRoot
from tests.encoded import all_files, store_json
from tests.makers import flip


def test_everything_is_exported_with_the_same_bytes(checkout, tmp_path):
    out, before = tmp_path / "out", checkout.files()
    result = checkout.run("export", "cache", out, "--json")
    assert result.code == 0 and result.document["num_units"] == 3
    files = all_files(out)
    assert before.items() <= files.items() and checkout.files() == before
    assert set(files) - set(before) == {"README.md", CHECKSUMS, "configs/dataset/vpt.yaml", "configs/encoder/tiny.yaml"}
    listed = dict(reversed(line.split("  ", 1)) for line in (out / CHECKSUMS).read_text().splitlines())
    assert set(listed) == set(files) - {CHECKSUMS}
    subprocess.run(["sha256sum", "--quiet", "-c", CHECKSUMS], cwd=out, check=True)
    text = (out / "README.md").read_text()
    assert "UNTRAINED" in text and "unknown: fill in" in text and checkout.manifest.digest in text
    assert checkout.manifest.recipe["encoder"]["weights"] in text and str(checkout.folder) not in text


def test_a_store_that_is_whole_but_not_the_listed_one_is_named_everywhere_never_exported_and_never_left(
    checkout, tmp_path
):
    out = tmp_path / "out"
    checkout.run("export", "cache", out)
    before = all_files(out)
    with store_json(
        CacheRoot(out).tokens(checkout.manifest.fingerprint, checkout.manifest.entries[0].unit_digest)
    ) as it:
        it["content"]["card"]["notes"] = ["x"]  # whole, but not the one that was listed
    assert checkout.run("export", "cache", out).code == 0 and all_files(out) == before
    for number, store in enumerate((checkout.tokens(), checkout.actions(1))):
        with store_json(store) as it:
            it["content"]["card"]["notes"] = ["x"]
        result = checkout.run("export", "cache", tmp_path / f"{number}")
        assert result.code == 2 and f"{store} is not the store that the manifest lists" in result.err
        assert f"{store} is not the store that the manifest lists" in checkout.run("verify").out
        with pytest.raises(ValueError, match=f"{store} is not the store that the manifest lists"):
            open_dataset(load_config(checkout.folder), checkout.folder)
        assert not (tmp_path / f"{number}/manifests").exists()
        shutil.rmtree(store)
        shutil.copytree(out / store.relative_to(checkout.root.path), store)


def test_a_damaged_store_is_never_exported_and_an_interrupted_export_is_finished(checkout, tmp_path):
    flip(checkout.tokens(2) / "tokens/c/0/0/0", 100)
    result = checkout.run("export", "cache", tmp_path / "out")
    assert result.code == 2 and "sha256 differs" in result.err and "jepa-cache verify --repair" in result.err
    assert not list((tmp_path / "out").rglob(checkout.tokens(2).name)) and not (tmp_path / "out/manifests").exists()
    first = CacheRoot(tmp_path / "out").tokens(checkout.manifest.fingerprint, checkout.manifest.entries[0].unit_digest)
    time = (first / "store.json").stat().st_mtime_ns
    flip(checkout.tokens(2) / "tokens/c/0/0/0", 100)
    assert checkout.run("export", "cache", tmp_path / "out").code == 0
    assert (first / "store.json").stat().st_mtime_ns == time
    (first.parent / ".jepa-cache-0123456789ab-dead.zarr").mkdir()  # of an export that was killed
    flip(first / "steps.parquet", 200)
    assert checkout.run("export", "cache", tmp_path / "out").code == 0
    assert checkout.run("verify", f"cache.root={tmp_path / 'out'}").code == 0
    assert not list((tmp_path / "out").rglob(".jepa-cache-*"))


def test_a_folder_that_holds_something_else_is_refused_and_so_is_every_export_during_a_clean_up(checkout, tmp_path):
    file, foreign, other = (tmp_path / name for name in ("file", "foreign", "other"))
    file.write_text("mine")
    foreign.mkdir()
    (foreign / "mine.txt").write_text("mine")
    checkout.run("export", "cache", other)
    (other / f"manifests/{checkout.manifest.digest}.json").rename(other / f"manifests/{'0' * 32}.json")
    before = all_files(tmp_path)
    for out, said in (
        (file, "is a file"),
        (foreign, "holds mine.txt"),
        (other, f"holds {'0' * 32}.json"),
        (checkout.root.path / "out", "lies in the cache root"),
        (checkout.root.path, "lies in the cache root"),
    ):
        result = checkout.run("export", "cache", out, "--json")
        assert result.code == 1 and said in result.document["error"]
    with checkout.root.exclusive_lock():
        result = checkout.run("export", "cache", tmp_path / "out", "--json")
    assert result.code == 1 and "in use" in result.document["error"]
    assert all_files(tmp_path) == before
