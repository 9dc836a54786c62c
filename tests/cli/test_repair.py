"""Claims of `jepa-cache repair`: what is damaged or missing is made again with the bytes it had, and nothing else is touched.

What cannot be made again is said loudly and left as it is; what comes out with another digest is said too.
"""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from jepa_cache.store.manifest import write_manifest
from tests.cli.test_verify import CLASSES, flip
from tests.makers import make_vpt_pair, write_vpt_tar


@pytest.fixture
def watched(monkeypatch):
    """Names of the units that are encoded."""
    from jepa_cache.encoding import verification

    names, encode_here = [], verification.encode_here

    def encode(groups, root):
        names.extend(unit.name for group in groups for unit in group.units)
        return encode_here(groups, root)

    monkeypatch.setattr(verification, "encode_here", encode)
    return names


def _unit(checkout, number):
    """Name of the recording of the n-th unit of the manifest."""
    from jepa_cache.store.digests import DigestTable

    digests = dict(zip(*_digests(DigestTable(), checkout), strict=True))
    return digests[checkout.manifest.entries[number].unit_digest]


def _digests(table, checkout):
    paths = sorted(checkout.recordings.glob("*.tar"))
    return [table.digest_unit([path]) for path in paths], [path.name for path in paths]


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_of_damage_is_repaired_with_the_same_bytes(checkout, encoded, watched, name):
    kind, file, place = CLASSES[name]
    before, times = checkout.files(), _times(checkout)
    store = getattr(checkout, kind)(1)
    flip(store / file if file else store, place)
    result = checkout.run("repair", "--json", checkout.recordings)
    assert result.code == 0 and result.document["ok"] and result.document["repaired"] == [str(store)], result
    assert checkout.files() == before
    assert watched == ([_unit(checkout, 1)] if kind == "tokens" else [])
    touched = {path for path, time in _times(checkout).items() if times.get(path) != time}
    assert all(path == str(store) or path.startswith(f"{store}/") for path in touched)


def _times(checkout):
    files = (path for path in checkout.root.path.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path): path.stat().st_mtime_ns for path in files}


def test_a_whole_cache_needs_no_repair_and_no_encoder(checkout, monkeypatch):
    monkeypatch.setattr("jepa_cache.encoding.verification.open_encoder", None)
    before = _times(checkout)
    result = checkout.run("repair", checkout.recordings)
    assert result.code == 0 and "nothing to repair" in result.out and _times(checkout) == before


def test_all_that_is_missing_is_made_again(checkout, watched):
    before = checkout.files()
    shutil.rmtree(checkout.root.path / "tokens")
    shutil.rmtree(checkout.root.path / "actions")
    shutil.rmtree(checkout.root.path / "controls")
    shutil.rmtree(checkout.root.path / "manifests")
    assert checkout.run("repair", checkout.recordings).code == 0
    assert checkout.files() == before and len(watched) == 3


def test_recordings_that_no_manifest_lists_are_not_encoded(checkout, watched):
    write_vpt_tar(checkout.recordings / "new.tar", {"n": make_vpt_pair(30, 78)})
    shutil.rmtree(checkout.tokens(0))
    assert checkout.run("repair", checkout.recordings).code == 0
    assert watched == [_unit(checkout, 0)]
    assert len(list(checkout.root.path.glob("tokens/*/*.zarr"))) == 3


def test_a_unit_whose_recording_is_gone_is_left_as_it_is_and_told(checkout):
    number = next(n for n in range(3) if _unit(checkout, n) == "b.tar")
    digest = checkout.manifest.entries[number].unit_digest
    (checkout.recordings / "b.tar").unlink()
    flip(checkout.tokens(number) / "tokens/c/0/0/0", 100)
    before = checkout.files()
    result = checkout.run("repair", "--json", checkout.recordings)
    assert result.code == 1 and result.document["lost"] == [digest] and checkout.files() == before
    assert "NOT REPAIRED" in checkout.run("repair", checkout.recordings).out


def test_a_recording_is_found_where_it_was_last_seen(checkout, tmp_path):
    number = next(n for n in range(3) if _unit(checkout, n) == "b.tar")
    before = checkout.files()
    (checkout.recordings / "b.tar").rename(tmp_path / "elsewhere.tar")
    _digests_of_folder(tmp_path)
    flip(checkout.tokens(number) / "tokens/c/0/0/0", 100)
    assert checkout.run("repair", checkout.recordings).code == 0 and checkout.files() == before


def _digests_of_folder(folder):
    from jepa_cache.store.digests import DigestTable

    for path in folder.glob("*.tar"):
        DigestTable().digest_unit([path])


def test_other_settings_repair_nothing_and_name_the_field(checkout):
    flip(checkout.tokens() / "tokens/c/0/0/0", 100)
    before = checkout.files()
    result = checkout.run("repair", checkout.recordings, "encode.fps=4")
    assert result.code == 2 and "sampling.fps: 5.0 -> 4.0" in result.err and checkout.files() == before


def test_another_digest_than_listed_is_told_loudly(checkout):
    """As where another device or library gives other bits: here the manifest lists a digest that nothing has."""
    manifest = checkout.manifest
    (part,) = manifest.parts
    entries = (part.entries[0], replace(part.entries[1], tokens_digest="0" * 64), *part.entries[2:])
    other = replace(manifest, parts=(replace(part, entries=entries),))
    write_manifest(other, [checkout.manifest_path, checkout.root.manifest(other.digest)])
    result = checkout.run("repair", "--json", checkout.recordings)
    assert result.code == 1 and len(result.document["differing"]) == 1
    assert str(checkout.tokens(1)) in result.document["differing"][0] and "0" * 64 in result.document["differing"][0]
    assert "ANOTHER DIGEST" in checkout.run("repair", checkout.recordings).out


def test_a_unit_of_which_every_recording_was_skipped_is_repaired(fresh):
    write_vpt_tar(fresh.recordings / "short.tar", {"s": (b"no video", b"{}\n")})
    fresh.encode("encode.max_skipped_share=0.5")
    before = fresh.files()
    number = next(n for n, entry in enumerate(fresh.manifest.entries) if entry.num_steps == 0)
    (fresh.tokens(number) / "steps.parquet").unlink()
    result = fresh.run("repair", fresh.recordings, "encode.max_skipped_share=0.5")
    assert result.code == 0 and fresh.files() == before


@pytest.mark.parametrize("kind", ["tokens", "actions", "controls"])
def test_what_another_process_has_made_again_meanwhile_is_left_alone(checkout, watched, monkeypatch, kind):
    """The other one holds the claim while damage is looked for, and has put the store right when it lets go."""
    from jepa_cache.encoding import verification

    place, before = getattr(checkout, kind)(1), checkout.files()
    damaged = place if place.is_file() else place / "store.json"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-9])
    found, other = threading.Event(), checkout.root.claim(place)
    assert other is not None
    real = verification._find_units
    monkeypatch.setattr(verification, "_find_units", lambda *given: found.set() or real(*given))

    def put_right():
        assert found.wait(60)
        damaged.write_bytes(content)
        other.release()

    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(put_right)
        inode = place.stat().st_ino
        assert checkout.run("repair", "--fresh", checkout.recordings).code == 0
        work.result()
    assert place.stat().st_ino == inode and checkout.files() == before and watched == []
