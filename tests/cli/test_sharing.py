"""Claims of cli/sharing.py: an exported cache goes through a URL and back, every byte checked, and stage two reads it without an encoder."""

import runpy
import shlex
import shutil

import pytest

from jepa_cache.cli.sharing import CHECKSUMS, read_sums
from jepa_cache.data.episodes import Dataset
from tests.encoded import all_files
from tests.makers import flip
from tests.store.s3_server import BUCKET


@pytest.fixture(params=["file", "s3"])
def url(request, tmp_path, monkeypatch):
    """A place to share at: a folder, or a bucket of a server on loopback."""
    if request.param == "file":
        return f"file://{tmp_path}/shared"
    pytest.importorskip("s3fs", reason="s3fs (extra `objects`) is not installed")
    server = request.getfixturevalue("proxied")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.direct_url)
    return f"s3://{BUCKET}/{tmp_path.name}"


@pytest.fixture
def shared(checkout, tmp_path):
    """A checkout whose cache was shared in a folder, and is gone; the folder and its URL."""
    url = f"file://{tmp_path}/shared"
    assert checkout.run("export", "cache", tmp_path / "out", "--to", url).code == 0
    shutil.rmtree(checkout.root.path)
    checkout.manifest_path.unlink()
    return tmp_path / "shared", url


def test_what_was_shared_arrives_whole_and_stage_two_reads_it(checkout, tmp_path, url, monkeypatch):
    result = checkout.run("export", "cache", tmp_path / "out", "--to", url)
    assert result.code == 0 and f"next: jepa-cache pull {url} FOLDER" in result.out
    sent = all_files(tmp_path / "out")
    shutil.rmtree(checkout.root.path)
    checkout.manifest_path.unlink()
    result = checkout.run("pull", url, tmp_path / "mine", "--json")
    assert result.code == 0 and result.document["num_units"] == 3 and result.document["differences"] == []
    assert all_files(tmp_path / "mine") == sent
    monkeypatch.chdir(checkout.folder)
    assert Dataset.open([f"cache.root={tmp_path / 'mine'}"]).keys() == ["w", "x", "y", "z"]
    assert checkout.run("verify", f"cache.root={tmp_path / 'mine'}").code == 0
    document = checkout.run("gc", f"cache.root={tmp_path / 'mine'}", "--json").document
    assert document["unneeded"] == document["unknown"] == []
    assert (tmp_path / "out/README.md").read_text().startswith("---\nlicense: unknown\n")


def test_a_pull_goes_on_and_takes_no_damaged_file(checkout, tmp_path, shared):
    folder, url = shared
    stored = next(path for path in sorted(folder.rglob("*")) if "/c/" in str(path) and path.is_file())
    flip(stored, 0)
    result = checkout.run("pull", url, tmp_path / "mine")
    assert result.code == 2 and f"{stored.relative_to(folder)} is damaged" in result.err
    assert not (tmp_path / "mine" / stored.relative_to(folder)).exists() and not checkout.manifest_path.exists()
    flip(stored, 0)
    (tmp_path / "mine/.jepa-cache-0123456789ab-README.md").touch()  # of a pull that was killed
    assert checkout.run("pull", url, tmp_path / "mine").code == 0
    (stored.parent / "gone").touch()
    stored.unlink()
    assert checkout.run("pull", url, tmp_path / "mine").code == 0  # it is here already
    result = checkout.run("pull", url, tmp_path / "other")
    assert result.code == 2 and "cannot be read (FileNotFoundError" in result.err


def test_settings_that_differ_from_the_cache_are_named(checkout, tmp_path, shared):
    settings = checkout.folder / "params.yaml"
    settings.write_text(settings.read_text().replace("dtype: float16", "dtype: int8"))
    result = checkout.run("pull", shared[1], tmp_path / "mine")
    assert result.code == 0 and "set as in the cache: encode.dtype is 'int8', the manifest has 'float16'" in result.out


def test_presets_of_ones_own_come_along_and_the_next_command_works_where_they_were_missing(checkout, tmp_path):
    presets = [checkout.folder / "configs" / name for name in ("dataset/mine.yaml", "encoder/small.yaml")]
    for preset, model in zip(presets, ("vpt", "tiny"), strict=True):
        shutil.copyfile(preset.with_name(f"{model}.yaml"), preset)
    checkout.encode("dataset=mine", "encoder=small")
    assert checkout.run("export", "cache", tmp_path / "out").code == 0
    texts, url = [preset.read_text() for preset in presets], f"file://{tmp_path}/out"
    for preset in presets:
        preset.unlink()
    shutil.rmtree(checkout.root.path)
    result = checkout.run("pull", url, tmp_path / "mine")
    assert result.code == 0 and [preset.read_text() for preset in presets] == texts
    assert "set as in the cache" not in result.out and f"wrote {presets[0]}, which came with the cache" in result.out
    command = shlex.split(result.out.rpartition("next: python ")[2])
    assert command == ["stages/fit_scaler.py", "dataset=mine", "encoder=small", f"cache.root={tmp_path / 'mine'}"]
    runpy.run_path(command[0])["main"](command[1:])
    assert (checkout.folder / "outputs/scaler/scaler.json").is_file()
    presets[0].write_text(f"{texts[0]}# changed\n")
    result = checkout.run("pull", url, tmp_path / "mine")
    assert (
        f"kept {presets[0]}, which is not as the one that came" in result.out and "# changed" in presets[0].read_text()
    )
    # The first release exported none.
    presets[0].unlink()
    shutil.copytree(tmp_path / "out", tmp_path / "old")
    sums = (tmp_path / "old" / CHECKSUMS).read_text().splitlines(keepends=True)
    (tmp_path / "old" / CHECKSUMS).write_text("".join(line for line in sums if "configs/" not in line))
    result = checkout.run("pull", f"file://{tmp_path}/old", tmp_path / "older")
    assert result.code == 2 and "configs/dataset/mine.yaml, with which the cache was made, is neither in" in result.err
    presets[0].write_text(texts[0])
    assert checkout.run("pull", f"file://{tmp_path}/old", tmp_path / "older").code == 0
    presets[1].unlink()
    manifest = ["--manifest", checkout.manifest_path]
    result = checkout.run("export", "cache", tmp_path / "third", f"cache.root={tmp_path / 'mine'}", *manifest)
    assert (
        result.code == 2
        and "configs/encoder/small.yaml, with which" in result.err
        and not (tmp_path / "third").exists()
    )


def test_what_is_no_exported_cache_is_refused(checkout, tmp_path, shared):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").touch()
    for arguments, words in (
        ((shared[1], tmp_path / "full"), "holds something else than a pulled cache"),
        ((f"file://{tmp_path}/nowhere", tmp_path / "a"), "lacks SHA256SUMS, or cannot be read"),
        (("nonsense://x", tmp_path / "a"), "cannot be used"),
    ):
        result = checkout.run("pull", *arguments)
        assert result.code == 2 and words in result.err and "Traceback" not in result.err
    for line in (
        "x",
        f"{'0' * 64}  ../x",
        f"{'0' * 64}  /etc/x",
        f"{'0' * 64}  tokens/../../x",
        f"{'0' * 64}  other/x",
    ):
        (tmp_path / CHECKSUMS).write_text(f"{line}\n")
        with pytest.raises(ValueError, match="is no list of an exported cache"):
            read_sums(tmp_path / CHECKSUMS)
