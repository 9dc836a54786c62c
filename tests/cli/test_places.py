"""Claims: a store is used only under the path that it was published as, whichever way it got elsewhere.

A folder of stores renamed to another fingerprint, or a store copied under another unit's name, is named by verify, refused when opened
for training, and never listed by encode, which makes the store again. Stores of the first release, which do not say of which
unit they are, stay readable, and are told by their episodes; the message then leads out.
"""

import shutil
from dataclasses import replace

import pytest

from jepa_cache.store.manifest import write_manifest
from tests.encoded import store_json


def make_old(root):
    """Store files as the first release wrote them."""
    for path in root.path.rglob("store.json"):
        with store_json(path.parent) as document:
            del document["published_as"]


def put_in_place_of(store, other):
    shutil.rmtree(store)
    shutil.copytree(other, store)


def list_twice(checkout):
    """The manifest of the first unit's stores under the second one's name, as an encode without checks lists them."""
    (part,) = checkout.manifest.parts
    first, second, third = part.entries
    copied = replace(first, unit_digest=second.unit_digest)
    manifest = replace(checkout.manifest, parts=(replace(part, entries=(first, copied, third)),))
    write_manifest(manifest, [checkout.manifest_path, checkout.root.manifest(manifest.digest)])


@pytest.mark.parametrize("old", [False, True])
def test_stores_under_another_units_name_are_named_by_verify_and_made_again(checkout, old):
    if old:
        make_old(checkout.root)
    before, honest = checkout.files(), checkout.manifest
    put_in_place_of(checkout.tokens(1), checkout.tokens(0))
    put_in_place_of(checkout.actions(1), checkout.actions(0))
    list_twice(checkout)
    result = checkout.run("verify", "--json")
    found = [finding for finding in result.document["findings"] if finding["path"] == str(checkout.tokens(1))]
    assert result.code == 1 and found and found[0]["kind"] == "tokens"
    assert "ANOTHER DIGEST" in checkout.run("verify", "--repair", str(checkout.recordings)).out
    checkout.encode()
    assert checkout.manifest == honest
    changed = {name for name, content in checkout.files().items() if before.get(name) not in (None, content)}
    assert all(old and name.endswith("store.json") for name in changed)


def test_an_old_store_of_another_unit_is_blamed_itself_and_the_advice_leads_out(checkout):
    make_old(checkout.root)
    honest, controls = checkout.manifest, checkout.controls(1).read_bytes()
    put_in_place_of(checkout.tokens(1), checkout.tokens(0))
    with pytest.raises(ValueError, match=f"{checkout.tokens(1)} holds .* another unit's store. Delete both"):
        checkout.encode()
    shutil.rmtree(checkout.tokens(1))
    checkout.controls(1).unlink()
    checkout.encode()
    assert checkout.manifest == honest and checkout.controls(1).read_bytes() == controls


@pytest.mark.parametrize("old", [False, True])
def test_a_folder_renamed_to_another_fingerprint_is_not_taken_for_its_stores(checkout, old):
    if old:
        make_old(checkout.root)
    mine = checkout.tokens().parent
    kept = mine.rename(mine.with_name("kept"))
    checkout.encode("encode.fps=4")
    other, honest = checkout.tokens().parent, checkout.manifest
    shutil.rmtree(other)
    shutil.copytree(kept, other)
    result = checkout.run("verify")
    assert result.code == 1 and "not the store that its path says" in result.out
    checkout.encode("encode.fps=4")
    assert checkout.manifest == honest
