"""Claims: a manifest reads back as it was written, has one spelling, and is written whole or not at all.

One that was changed since, or has another form, is refused.
"""

import dataclasses
import hashlib
import json

import pytest

from jepa_cache.store.manifest import Manifest, ManifestEntry, ManifestPart, read_manifest, write_manifest
from jepa_cache.store.recipe import canonical_json

ENTRY = ManifestEntry("a" * 64, "b" * 64, "c" * 64, 10, 2, 1, reconstruction_rmse=0.1, reconstruction_max_abs=0.5)
PART = ManifestPart(
    dataset="vpt",
    weight=1.0,
    camera="wrist",
    phase=0,
    fingerprint="1" * 32,
    recipe={"z": 1, "a": {"y": [1, 2], "b": None}},
    action_fingerprint="2" * 32,
    action_recipe={"action_space": "vpt13"},
    source_fingerprint="3" * 32,
    skipped=({"key": "k", "reason": "why"},),
    notes=("k: a note",),
    entries=(ENTRY, dataclasses.replace(ENTRY, unit_digest="d" * 64, num_steps=5)),
)
MANIFEST = Manifest(
    dataset="vpt",
    num_tokens=16,
    width=64,
    grid=(4, 4),
    mode="frame",
    encoder="tiny",
    encoder_trained=False,
    comparable=True,
    action_space="vpt13",
    parts=(PART,),
    encoder_origin="mine",
)


def test_what_is_written_is_what_is_read_in_one_spelling_and_an_identical_file_is_left_untouched(tmp_path):
    paths = [tmp_path / "x/manifest.json", tmp_path / "y.json"]
    write_manifest(MANIFEST, paths)
    before = paths[0].stat()
    reordered = dataclasses.replace(PART, recipe={"a": {"b": None, "y": [1, 2]}, "z": 1})
    write_manifest(dataclasses.replace(MANIFEST, parts=(reordered,)), paths)
    assert (paths[0].stat().st_ino, paths[0].stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert read_manifest(paths[0]) == MANIFEST and MANIFEST.num_steps == 15
    assert (
        paths[0].read_bytes()
        == paths[1].read_bytes()
        == MANIFEST.to_bytes()
        == canonical_json(json.loads(MANIFEST.to_bytes()))
    )
    write_manifest(dataclasses.replace(MANIFEST, dataset="mine"), paths)
    assert read_manifest(paths[0]).dataset == "mine"


def test_several_parts_have_an_identity_of_their_own_and_keep_their_stores_apart():
    other = dataclasses.replace(PART, fingerprint="4" * 32, entries=(ENTRY,))
    both = dataclasses.replace(MANIFEST, parts=(PART, other))
    assert MANIFEST.fingerprint == "1" * 32 and both.fingerprint not in ("1" * 32, "4" * 32)
    assert [part.fingerprint[0] for part, _ in both.stores] == ["1", "1", "4"]
    assert len(both.entries) == 3 and both.notes == MANIFEST.notes


FORMS = {
    "field gone": (lambda document, part, entry: part.pop("entries"), "'entries'"),
    "other version": (lambda document, part, entry: document.update(manifest_version=99), "has version 99, .* reads 1"),
    "no version": (lambda document, part, entry: document.pop("manifest_version"), "manifest_version"),
    "parent": (lambda document, part, entry: part.update(fingerprint=".."), "fingerprint is 32 hex.*, not '..'"),
    "newline": (lambda document, part, entry: part.update(action_fingerprint="1" * 32 + "\n"), "action_fingerprint is"),
    "unit": (lambda document, part, entry: entry.update(unit_digest="../x"), "unit_digest is 64 hex"),
    "number": (lambda document, part, entry: entry.update(tokens_digest=5), "tokens_digest is 64 hex"),
}


@pytest.mark.parametrize(("change", "said"), FORMS.values(), ids=FORMS)
def test_a_manifest_of_another_form_is_refused_with_the_way_out(tmp_path, change, said):
    document = json.loads(MANIFEST.to_bytes())
    del document["sha256"]
    change(document, part := document["parts"][0], part.get("entries")[1])
    document["sha256"] = hashlib.sha256(canonical_json(document)).hexdigest()  # as if it had been written so
    (tmp_path / "manifest.json").write_bytes(canonical_json(document))
    with pytest.raises(ValueError, match=rf"manifest\.json is no valid manifest \(.*{said}.*encode\.py"):
        read_manifest(tmp_path / "manifest.json")


def test_a_manifest_of_which_any_value_was_changed_is_refused(tmp_path):
    path, content = tmp_path / "manifest.json", MANIFEST.to_bytes()
    path.write_bytes(content)
    assert read_manifest(path) == MANIFEST
    digits = [number for number, byte in enumerate(content) if 48 <= byte < 57]
    for number in digits[:: max(1, len(digits) // 50)]:
        path.write_bytes(content[:number] + bytes([content[number] + 1]) + content[number + 1 :])
        with pytest.raises(ValueError, match=r"changed since it was written: its sha256 differs|it has version 2"):
            read_manifest(path)
    document = json.loads(content)
    del document["sha256"]
    path.write_bytes(canonical_json(document))
    with pytest.raises(ValueError, match="its sha256 differs"):
        read_manifest(path)


def test_a_missing_or_cut_manifest_is_named_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(ValueError, match=r"is missing; run `python stages/encode\.py`"):
        read_manifest(tmp_path / "manifest.json")
    (tmp_path / "manifest.json").write_bytes(MANIFEST.to_bytes()[:100])
    with pytest.raises(ValueError, match="no valid manifest"):
        read_manifest(tmp_path / "manifest.json")
