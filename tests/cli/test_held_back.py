"""Claims: after an encode that failed, was interrupted or killed, no later stage uses the manifest from before without a word.

Its bytes and time stay; the next encode that ends well frees it, and so does another manifest in its place.
"""

import os
import signal

import pytest

from jepa_cache.config.loading import load_config
from jepa_cache.data.dataset import open_dataset
from jepa_cache.encoding import run
from jepa_cache.store.manifest import replaced, why_held_back


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
    child = os.fork()
    if child == 0:
        with replaced(checkout.manifest_path):
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert "was interrupted" in why_held_back(checkout.manifest_path)
    checkout.manifest_path.write_bytes(checkout.manifest_path.read_bytes() + b"\n")
    assert why_held_back(checkout.manifest_path) is None, "another manifest was put in its place"
    checkout.manifest_path.unlink()
    assert why_held_back(checkout.manifest_path) is None
