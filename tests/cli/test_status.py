"""Claims of `jepa-cache status`: every unit is done, missing, stale, damaged or unread, and what is stale says why.

A field of the recipe that changed is named with both values; edited, deleted and removed things are noticed; nothing is changed.
After an encode that failed, was interrupted or killed, no later stage uses the manifest from before without a word; its bytes and time
stay, and the next encode that ends well frees it, as another manifest in its place does.
"""

import os
import shutil
import signal

import pytest

from jepa_cache.config.loading import load_config
from jepa_cache.data.dataset import open_dataset
from jepa_cache.encoding import groups, run
from jepa_cache.store.manifest import replaced, why_held_back
from tests.encoded import store_json
from tests.makers import make_vpt_pair, write_vpt_tar


def _status(checkout, *overrides):
    return checkout.run("status", "--json", checkout.recordings, *overrides)


def test_an_encoded_data_set_is_ready(checkout):
    before = checkout.files()
    result = _status(checkout)
    (part,) = result.document["parts"]
    assert result.code == 0 and result.document["ready"]
    assert (part["done"], part["num_units"], part["num_steps"]) == (3, 3, checkout.manifest.num_steps)
    assert result.document["manifest"] == {"digest": checkout.manifest.digest, "current": True, "reason": ""}
    assert checkout.files() == before


def test_a_changed_field_makes_units_stale_and_is_named_with_both_values(checkout):
    first = min(checkout.tokens().parent.glob("*.zarr")) / "store.json"
    whole = first.read_bytes()
    first.write_text("{")  # damage under another recipe hides nothing
    for override, change in (
        ("encode.fps=4", "sampling.fps: 5.0 -> 4.0"),
        ("encode.compute_dtype=bfloat16", "compute_dtype: 'float32' -> 'bfloat16'"),
        ("encode.dtype=int8", "dtype: 'float16' -> 'int8'"),
        ("encode.decoder=pyav", "decoder: 'auto' -> 'pyav'"),
    ):
        result = _status(checkout, override)
        (part,) = result.document["parts"]
        assert result.code == 1 and (part["stale"], part["done"], part["missing"]) == (3, 0, 0)
        assert part["why"] == [{"fingerprint": checkout.manifest.fingerprint, "num_units": 3, "changes": [change]}]
    text = checkout.run("status", checkout.recordings, override).out
    assert change in text and "another recipe" in text
    first.write_bytes(whole)
    nearer = checkout.root.path / "tokens" / ("f" * 32) / checkout.tokens(1).name  # stored as int8, as far as it says
    shutil.copytree(checkout.tokens(1), nearer)
    with store_json(nearer) as document:
        document["content"]["card"]["recipe"]["dtype"] = "int8"
    (part,) = _status(checkout, "encode.dtype=int8", "encode.fps=4").document["parts"]
    changes = {why["fingerprint"]: (why["num_units"], len(why["changes"])) for why in part["why"]}
    assert changes == {checkout.manifest.fingerprint: (2, 2), "f" * 32: (1, 1)}, "the nearest recipe explains a unit"


def test_weights_that_are_not_here_are_not_downloaded(checkout, monkeypatch):
    monkeypatch.setattr("jepa_cache.encoder.vjepa2.urlopen", lambda *_: pytest.fail("a download was begun"))
    result = _status(checkout, "encoder=vitl")
    assert result.code == 1 and "are not on this machine" in result.document["notes"][0]


def test_damaged_and_deleted_stores_are_named(checkout):
    manifest, stores = checkout.manifest, [checkout.tokens(number) for number in range(3)]
    (stores[0] / "tokens/c/0/0/0").write_bytes(b"")
    (stores[1] / "steps.parquet").unlink()
    text = (stores[2] / "store.json").read_text().replace('"format_version": 1', '"format_version": 7')
    (stores[2] / "store.json").write_text(text)
    units = _status(checkout).document["parts"][0]["units"]
    assert [unit["state"] for unit in units] == ["damaged"] * 3
    for store in stores:
        assert sum(str(store) in unit["reason"] for unit in units) == 1
    assert any("store format 7" in unit["reason"] for unit in units)
    for store in stores[1:]:
        shutil.rmtree(store)
    result = _status(checkout)
    missing = [unit["reason"] for unit in result.document["parts"][0]["units"] if unit["state"] == "missing"]
    assert result.code == 1 and missing == [f"its store was deleted: manifest {manifest.digest} lists it"] * 2


def test_renamed_removed_and_added_recordings_are_done_told_and_missing(checkout):
    (checkout.recordings / "b.tar").rename(checkout.recordings / "renamed.tar")
    assert _status(checkout).document["parts"][0]["done"] == 3
    (checkout.recordings / "renamed.tar").unlink()
    write_vpt_tar(checkout.recordings / "new.tar", {"n": make_vpt_pair(30, 78)})
    result = _status(checkout)
    (part,) = result.document["parts"]
    assert (part["done"], part["missing"]) == (2, 1)
    assert "1 units that are not among the recordings any more" in result.document["manifest"]["reason"]
    assert "it lacks 1 of 3 units" in result.document["manifest"]["reason"]


def test_more_new_bytes_than_can_be_hashed_at_once_are_unread(checkout, monkeypatch):
    monkeypatch.setattr(groups, "SCAN_BYTES", 0)
    write_vpt_tar(checkout.recordings / "b.tar", {"z": make_vpt_pair(30, 77)})
    result = _status(checkout)
    (part,) = result.document["parts"]
    unread = [unit for unit in part["units"] if unit["state"] == "unread"]
    assert result.code == 1 and unread and all(unit["digest"] == "" for unit in unread)


def test_actions_that_are_not_there_whole_and_of_these_steps_and_space_must_be_made(checkout):
    result = _status(checkout, "encode.action_space=vpt36")
    (part,) = result.document["parts"]
    assert result.code == 1 and (part["done"], part["without_actions"]) == (3, 3)
    with store_json(checkout.actions(0)) as document:
        document["content"]["card"]["steps_digest"] = "0" * 64
    (checkout.actions(1) / "actions/c/0/0").write_bytes(b"")
    shutil.rmtree(checkout.actions(2))
    result = _status(checkout)
    assert result.code == 1 and not result.document["ready"]
    assert (result.document["parts"][0]["done"], result.document["parts"][0]["without_actions"]) == (3, 3)


def test_controls_that_are_gone_are_told_and_no_reason_to_encode(checkout):
    checkout.controls(1).unlink()
    result = _status(checkout)
    assert result.code == 0 and result.document["parts"][0]["without_controls"] == 1
    assert "1 units lack their controls" in checkout.run("status", checkout.recordings).out


def test_an_edited_tar_is_stale_with_both_digests_where_its_earlier_content_was_encoded(checkout):
    old = [entry.unit_digest for entry in checkout.manifest.entries]
    write_vpt_tar(checkout.recordings / "new.tar", {"n": make_vpt_pair(30, 78)})
    _status(checkout)  # which learns what is in it
    for name in ("b.tar", "new.tar"):
        write_vpt_tar(checkout.recordings / name, {"z": make_vpt_pair(30, 77 + len(name))})
    for overrides in ((), ("encode.fps=4",)):
        units = {unit["name"]: unit for unit in _status(checkout, *overrides).document["parts"][0]["units"]}
        stale, reason = units["b.tar"], units["b.tar"]["reason"]
        assert stale["state"] == "stale" and "edited since it was encoded: sha256" in reason
        assert any(digest[:12] in reason for digest in old) and stale["digest"][:12] in reason
        assert (units["new.tar"]["state"], units["new.tar"]["reason"]) == ("missing", "never encoded")


def test_a_store_that_was_made_again_with_other_bytes_is_told(checkout):
    with store_json(checkout.tokens()) as document:
        document["content"]["card"]["notes"] = ["another"]
    assert "1 stores were made again since" in _status(checkout).document["manifest"]["reason"]


def test_no_manifest_and_a_damaged_one_are_told(checkout):
    checkout.manifest_path.write_text("{")
    assert _status(checkout).document["manifest"]["reason"].startswith("damaged")
    checkout.manifest_path.unlink()
    result = _status(checkout)
    assert result.code == 1 and result.document["manifest"]["reason"].startswith("absent")


def open_it(checkout):
    open_dataset(load_config(checkout.folder), checkout.folder).close()


@pytest.mark.parametrize("error", [ValueError("3 of 4 recordings were skipped"), KeyboardInterrupt()])
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
