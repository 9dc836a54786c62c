"""Claims of `jepa-cache status`: every unit is done, missing, stale, damaged or unread, and what is stale says why.

A field of the recipe that changed is named with both values; edited, deleted and removed things are noticed; nothing is changed.
"""

import json
import shutil

import pytest

from jepa_cache.encoding import groups
from tests.encoded import write_store_json
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


@pytest.mark.parametrize(
    ("override", "field", "values"),
    [
        ("encode.fps=4", "sampling.fps", ("5.0", "4.0")),
        ("encode.compute_dtype=bfloat16", "compute_dtype", ("'float32'", "'bfloat16'")),
        ("encode.dtype=int8", "dtype", ("'float16'", "'int8'")),
        ("encode.decoder=pyav", "decoder", ("'auto'", "'pyav'")),
    ],
)
def test_a_changed_field_makes_units_stale_and_is_named_with_both_values(checkout, override, field, values):
    result = _status(checkout, override)
    (part,) = result.document["parts"]
    (why,) = part["why"]
    assert result.code == 1 and (part["stale"], part["done"], part["missing"]) == (3, 0, 0)
    assert why["num_units"] == 3 and why["fingerprint"] == checkout.manifest.fingerprint
    assert why["changes"] == [f"{field}: {values[0]} -> {values[1]}"]
    text = checkout.run("status", checkout.recordings, override).out
    assert f"{field}: {values[0]} -> {values[1]}" in text and "another recipe" in text


def test_another_weights_file_under_the_same_name_is_named_as_the_change(checkout, tmp_path):
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"first")
    preset = checkout.folder / "configs/encoder/tiny.yaml"
    text = (
        preset.read_text()
        .replace("weights: null", f"weights: {weights}")
        .replace("random_seed: 0", "random_seed: null")
    )
    preset.write_text(text)
    first = _status(checkout).document["parts"][0]
    # A store of the first file, as far as its card says.
    old, new = checkout.tokens(), checkout.root.tokens(first["fingerprint"], checkout.manifest.entries[0].unit_digest)
    shutil.copytree(old, new)
    document = json.loads((new / "store.json").read_bytes())
    document["content"]["card"]["recipe"] = first["recipe"]
    write_store_json(new / "store.json", document)
    weights.write_bytes(b"another")
    (part,) = _status(checkout).document["parts"]
    (change,) = next(why["changes"] for why in part["why"] if why["fingerprint"] == first["fingerprint"])
    assert change.startswith("encoder.weights: 'file:") and change.count("file:") == 2


def test_weights_that_are_not_here_are_not_downloaded(checkout, monkeypatch):
    monkeypatch.setattr("jepa_cache.encoder.vjepa2.urlopen", lambda *_: pytest.fail("a download was begun"))
    result = _status(checkout, "encoder=vitl")
    assert result.code == 1 and "are not on this machine" in result.document["notes"][0]


def test_a_deleted_store_is_missing_and_said_to_be_deleted(checkout):
    shutil.rmtree(checkout.tokens(1))
    result = _status(checkout)
    (part,) = result.document["parts"]
    (missing,) = [unit for unit in part["units"] if unit["state"] == "missing"]
    assert result.code == 1 and part["done"] == 2
    assert missing["reason"] == f"its store was deleted: manifest {checkout.manifest.digest} lists it"


@pytest.mark.parametrize("harm", ["cut", "gone", "format"])
def test_a_damaged_store_is_named(checkout, harm):
    store = checkout.tokens()
    if harm == "cut":
        (store / "tokens/c/0/0/0").write_bytes(b"")
    elif harm == "gone":
        (store / "steps.parquet").unlink()
    else:
        text = (store / "store.json").read_text().replace('"format_version": 1', '"format_version": 7')
        (store / "store.json").write_text(text)
    (part,) = _status(checkout).document["parts"]
    (damaged,) = [unit for unit in part["units"] if unit["state"] == "damaged"]
    assert str(store) in damaged["reason"] and (harm != "format" or "store format 7" in damaged["reason"])


def test_an_edited_tar_is_stale_with_both_digests(checkout):
    old = [entry.unit_digest for entry in checkout.manifest.entries]
    _status(checkout)
    write_vpt_tar(checkout.recordings / "b.tar", {"z": make_vpt_pair(30, 77)})
    result = _status(checkout)
    (part,) = result.document["parts"]
    (stale,) = [unit for unit in part["units"] if unit["state"] == "stale"]
    assert stale["name"] == "b.tar" and "edited since it was encoded: sha256" in stale["reason"]
    assert any(digest[:12] in stale["reason"] for digest in old) and stale["digest"][:12] in stale["reason"]
    assert "1 units that are not among the recordings any more" in result.document["manifest"]["reason"]


def test_the_same_content_under_another_name_is_done(checkout):
    (checkout.recordings / "b.tar").rename(checkout.recordings / "renamed.tar")
    assert _status(checkout).document["parts"][0]["done"] == 3


def test_a_recording_that_was_removed_is_told_and_one_that_was_added_is_missing(checkout):
    (checkout.recordings / "b.tar").unlink()
    write_vpt_tar(checkout.recordings / "new.tar", {"n": make_vpt_pair(30, 78)})
    result = _status(checkout)
    (part,) = result.document["parts"]
    assert (part["done"], part["missing"]) == (2, 1)
    assert "not among the recordings any more" in result.document["manifest"]["reason"]
    assert "it lacks 1 of 3 units" in result.document["manifest"]["reason"]


def test_more_new_bytes_than_can_be_hashed_at_once_are_unread(checkout, monkeypatch):
    monkeypatch.setattr(groups, "SCAN_BYTES", 0)
    write_vpt_tar(checkout.recordings / "b.tar", {"z": make_vpt_pair(30, 77)})
    result = _status(checkout)
    (part,) = result.document["parts"]
    unread = [unit for unit in part["units"] if unit["state"] == "unread"]
    assert result.code == 1 and unread and all(unit["digest"] == "" for unit in unread)


def test_another_action_space_needs_actions_and_no_tokens(checkout):
    result = _status(checkout, "encode.action_space=vpt36")
    (part,) = result.document["parts"]
    assert result.code == 1 and (part["done"], part["without_actions"]) == (3, 3)


@pytest.mark.parametrize("harm", ["gone", "cut", "of other steps"])
def test_actions_that_are_not_there_whole_and_of_these_steps_must_be_made(checkout, harm):
    path = checkout.actions() / "store.json"
    if harm == "gone":
        shutil.rmtree(checkout.actions())
    elif harm == "cut":
        (checkout.actions() / "actions/c/0/0").write_bytes(b"")
    else:
        document = json.loads(path.read_bytes())
        document["content"]["card"]["steps_digest"] = "0" * 64
        write_store_json(path, document)
    result = _status(checkout)
    assert result.code == 1 and not result.document["ready"]
    assert (result.document["parts"][0]["done"], result.document["parts"][0]["without_actions"]) == (3, 1)


def test_controls_that_are_gone_are_told_and_no_reason_to_encode(checkout):
    checkout.controls(1).unlink()
    result = _status(checkout)
    assert result.code == 0 and result.document["parts"][0]["without_controls"] == 1
    assert "1 units lack their controls" in checkout.run("status", checkout.recordings).out


def test_damage_under_another_recipe_hides_nothing(checkout):
    first = min(checkout.tokens().parent.glob("*.zarr"))
    (first / "store.json").write_text("{")
    (part,) = _status(checkout, "encode.fps=4").document["parts"]
    assert part["stale"] == 3 and part["why"][0]["changes"] == ["sampling.fps: 5.0 -> 4.0"]


def test_an_edited_tar_is_stale_only_where_its_earlier_content_was_encoded(checkout):
    write_vpt_tar(checkout.recordings / "new.tar", {"n": make_vpt_pair(30, 78)})
    _status(checkout)  # which learns what is in it
    for name in ("b.tar", "new.tar"):
        write_vpt_tar(checkout.recordings / name, {"z": make_vpt_pair(30, 77 + len(name))})
    for overrides in ((), ("encode.fps=4",)):
        units = {unit["name"]: unit for unit in _status(checkout, *overrides).document["parts"][0]["units"]}
        assert units["b.tar"]["state"] == "stale" and "edited since it was encoded" in units["b.tar"]["reason"]
        assert (units["new.tar"]["state"], units["new.tar"]["reason"]) == ("missing", "never encoded")


def test_a_store_that_was_made_again_with_other_bytes_is_told(checkout):
    path = checkout.tokens() / "store.json"
    document = json.loads(path.read_bytes())
    document["content"]["card"]["notes"] = ["another"]
    write_store_json(path, document)
    assert "1 stores were made again since" in _status(checkout).document["manifest"]["reason"]


def test_recordings_that_repeat_another_one_are_named_as_encode_named_them(fresh):
    assert not _status(fresh).document["notes"]
    pair = make_vpt_pair(30, 77)
    write_vpt_tar(fresh.recordings / "twice.tar", {"one": pair, "other": pair})
    fresh.encode()
    result = _status(fresh)
    assert result.code == 0
    assert result.document["notes"] == ["recordings that repeat another one: 1 (one in twice.tar = other in twice.tar)"]


def test_no_manifest_and_a_damaged_one_are_told(checkout):
    checkout.manifest_path.write_text("{")
    assert _status(checkout).document["manifest"]["reason"].startswith("damaged")
    checkout.manifest_path.unlink()
    result = _status(checkout)
    assert result.code == 1 and result.document["manifest"]["reason"].startswith("absent")


@pytest.mark.parametrize("command", ["status", "estimate"])
def test_recordings_that_are_not_found_cannot_be_checked(checkout, command):
    result = checkout.run(command, "--json", checkout.folder / "nowhere")
    assert result.code == 2 and "finds no *.tar file" in result.document["error"] and "error: " in result.err
