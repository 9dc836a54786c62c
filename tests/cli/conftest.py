"""What the tests of the cache commands share: a small encoded data set, made once, of which every test has its own copy."""

import json
import runpy
import shutil
from functools import partialmethod
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from jepa_cache.cli.main import build_app
from jepa_cache.config.loading import REPOSITORY_ROOT
from jepa_cache.store.manifest import Manifest, read_manifest
from jepa_cache.store.root import CacheRoot
from tests.encoded import make_tars
from tests.workspace import copy_settings

EPISODES = {"a": {"x": 45, "y": 38}, "b": {"z": 41}, "c": {"w": 60}}
CHANGES = {
    "dataset: sample": "dataset: vpt",
    "batch_size: null     # encoder": "batch_size: 8     # encoder",
    "device: auto         # auto | cpu | cuda; which GPU: CUDA_VISIBLE_DEVICES=1 before the command": "device: cpu",
}


# Clips so short that the recordings below hold some.
CLIPS = ("encode.frames_per_clip=4", "train.window_steps=2", "train.auto_steps=1")
CLIPS = (*CLIPS, "evaluate.num_context_steps=1", "evaluate.horizon=1")


class Result(NamedTuple):
    """How a command ended: exit code, what it printed, and its JSON where --json was given."""

    code: int
    out: str
    err: str
    document: dict


def run(*arguments: object) -> Result:
    """Run `jepa-cache ...` in this process, from the present folder."""
    result = CliRunner().invoke(build_app(arguments[0]), [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    document = json.loads(result.stdout) if "--json" in arguments else {}
    return Result(result.exit_code, result.stdout, result.stderr, document)


class Checkout:
    """A checkout with a cache root, a state folder and recordings; commands run in it as users type them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recordings, self.state = folder / "recordings", folder / "state"
        self.manifest_path = folder / "outputs/encode/manifest.json"
        self.root = CacheRoot(folder / "cache")

    @property
    def manifest(self) -> Manifest:
        return read_manifest(self.manifest_path)

    def store(self, kind: str, number: int = 0) -> Path:
        """Store, or file of controls, of the n-th unit."""
        part, entry = self.manifest.stores[number]
        return next(self.root.store(key) for key in part.keys(entry) if key.kind == kind)

    tokens, actions, controls = (
        partialmethod(store, "tokens"),
        partialmethod(store, "actions"),
        partialmethod(store, "controls"),
    )

    run = staticmethod(run)

    def encode(self, *overrides: str) -> None:
        """Run the true stage one."""
        runpy.run_path(str(self.folder / "stages/encode.py"))["main"]([str(self.recordings), *overrides])

    def files(self) -> dict[str, bytes]:
        """Every file of the root but its lock."""
        paths = sorted(path for path in self.root.path.rglob("*") if path.is_file() and path.suffix != ".lock")
        return {str(path.relative_to(self.root.path)): path.read_bytes() for path in paths}


def _write_checkout(folder):
    copy_settings(folder)
    shutil.copytree(REPOSITORY_ROOT / "stages", folder / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    text = (folder / "params.yaml").read_text()
    for old, new in CHANGES.items():
        assert old in text
        text = text.replace(old, new)
    text = text.replace("  root: null", f"  root: {folder / 'cache'}", 1)
    (folder / "params.yaml").write_text(text)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with settings and presets of its own, in which a command is typed."""
    monkeypatch.chdir(copy_settings(tmp_path))
    return tmp_path


@pytest.fixture(scope="session")
def recordings(tmp_path_factory):
    return make_tars(tmp_path_factory.mktemp("tars"), EPISODES)


@pytest.fixture(scope="session")
def encoded(recordings, tmp_path_factory):
    """A checkout of which the recordings are encoded; copied, never changed."""
    folder = tmp_path_factory.mktemp("encoded")
    checkout = Checkout(folder)
    shutil.copytree(recordings, checkout.recordings)
    _write_checkout(folder)
    with pytest.MonkeyPatch.context() as patch:
        _enter(folder, patch).encode()
    return checkout


@pytest.fixture
def checkout(encoded, tmp_path, monkeypatch):
    """A copy of the encoded checkout, the present folder of the test."""
    folder = tmp_path / "checkout"
    shutil.copytree(encoded.folder, folder, symlinks=True, ignore=shutil.ignore_patterns("state"))
    text = (folder / "params.yaml").read_text().replace(str(encoded.folder), str(folder))
    (folder / "params.yaml").write_text(text)
    return _enter(folder, monkeypatch)


@pytest.fixture
def fresh(recordings, tmp_path, monkeypatch):
    """A checkout with recordings of which nothing is encoded."""
    folder = tmp_path / "fresh"
    shutil.copytree(recordings, folder / "recordings")
    _write_checkout(folder)
    return _enter(folder, monkeypatch)


def _enter(folder, monkeypatch):
    checkout = Checkout(folder)
    monkeypatch.setenv("XDG_STATE_HOME", str(checkout.state))
    monkeypatch.chdir(folder)
    return checkout
