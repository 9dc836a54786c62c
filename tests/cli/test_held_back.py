"""Claims: after an encode that failed, was interrupted or killed, no later stage uses the manifest from before without a word.

Its bytes and time stay; the next encode that ends well frees it, and so does another manifest in its place.
"""

import signal
import subprocess
import sys

import pytest

from jepa_cache.config.loading import load_config
from jepa_cache.data.cache import open_dataset
from jepa_cache.encoding import run
from jepa_cache.store.manifest import HELD_BACK, replaced, why_held_back


def open_it(checkout):
    open_dataset(load_config(checkout.folder), checkout.folder).close()


@pytest.mark.parametrize("error", [ValueError("3 of 4 recordings were skipped"), KeyboardInterrupt(), OSError("full")])
def test_a_manifest_from_before_a_failed_encode_is_refused_until_one_ends_well(checkout, monkeypatch, error):
    before = checkout.manifest_path.read_bytes(), checkout.manifest_path.stat().st_mtime_ns

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(run, "ensure_actions", fail)
        with pytest.raises(type(error)):
            checkout.encode()
    with pytest.raises(
        ValueError, match=r"from before the last .*encode\.py.* failed, was interrupted or .*Run it again"
    ):
        open_it(checkout)
    assert "from before the last" in checkout.run("status", "recordings").out
    exported = checkout.run("export", "cache", checkout.folder / "elsewhere")
    assert exported.code != 0 and "Run it again" in exported.out + exported.err
    checkout.encode()
    open_it(checkout)
    assert (checkout.manifest_path.read_bytes(), checkout.manifest_path.stat().st_mtime_ns) == before
    assert [path.name for path in checkout.manifest_path.parent.iterdir()] == ["manifest.json"]


def test_an_encode_that_was_refused_at_once_or_killed_counts_too(checkout):
    with pytest.raises(ValueError, match="no/such/folder"):
        checkout.encode("no/such/folder")
    assert "failed" in why_held_back(checkout.manifest_path)
    checkout.encode()
    script = (
        "import os, sys; from pathlib import Path; from jepa_cache.store.manifest import replaced\n"
        f"with replaced(Path({str(checkout.manifest_path)!r})): os.kill(os.getpid(), {signal.SIGKILL})"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert "was interrupted" in why_held_back(checkout.manifest_path)


def test_another_manifest_put_in_its_place_is_not_held_back(checkout):
    with pytest.raises(ValueError, match="bad"), replaced(checkout.manifest_path):
        raise ValueError("bad")
    assert checkout.manifest_path.with_name(HELD_BACK).is_file()
    checkout.manifest_path.write_bytes(checkout.manifest_path.read_bytes() + b"\n")
    assert why_held_back(checkout.manifest_path) is None
    checkout.manifest_path.unlink()
    assert why_held_back(checkout.manifest_path) is None
