"""Claims of `jepa-cache verify`: whatever byte of what a manifest lists is missing or flipped is found and named.

The message names store, chunk and episode and says what to type; steps that are encoded again are bit-equal,
and stores of other pixels are not. `--repair` makes what is damaged or missing again with the bytes that it had, and touches nothing
else; what cannot be made again, or comes out with another digest, is said loudly.
"""

import math
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from jepa_cache.encoder.frozen import FrozenEncoder
from jepa_cache.encoding import verification
from jepa_cache.encoding.task import Claims
from jepa_cache.encoding.verification import Comparison, StepResult
from jepa_cache.sources.vpt import VptSource
from jepa_cache.store.digests import DigestTable
from tests.cli.conftest import CLIPS
from tests.encoded import make_tars, replace_behind_the_table, store_json
from tests.makers import flip, make_vpt_pair, write_vpt_tar

# Every byte of every file is tests/encoding/test_flips.py's. In store.json: the format's number, which must not pass for another version.
PLACES = [
    ("tokens", "tokens/c/0/0/0", {100: 2}),
    ("tokens", "steps.parquet", {200: 2}),
    ("tokens", "store.json", {45: 0, 300: 3}),
    ("actions", "actions/c/0/0", {50: 2}),
    ("controls", "", {400: 2, -2: 2}),
]


def test_a_whole_cache_is_told_to_be_so_and_not_changed_and_needs_no_encoder(checkout, monkeypatch):
    monkeypatch.setattr(verification, "open_encoder", None)
    before, times = checkout.files(), _times(checkout)
    result = checkout.run("verify", "--json")
    assert result.code == 0 and result.document["ok"] and result.document["findings"] == []
    assert result.document["num_units"] == 3
    shards = sum(len(content) for name, content in before.items() if "tokens/c/" in name)
    assert 0.99 * shards < result.document["num_bytes"] <= shards
    result = checkout.run("verify", "--read-data", "--repair", checkout.recordings)
    assert result.code == 0 and "all is as it was written" in result.out
    assert checkout.files() == before and _times(checkout) == times


def _number(checkout, name):
    """Of the unit of a recording in the manifest."""
    digest = DigestTable().digest(checkout.recordings / name)
    return [entry.unit_digest for entry in checkout.manifest.entries].index(digest)


@pytest.fixture
def encoded_units(monkeypatch):
    """How many units are taken by the encoder."""
    units, take = [], Claims.take

    def watch(self):
        for unit in take(self):
            units.append(unit)
            yield unit

    monkeypatch.setattr(Claims, "take", watch)
    return units


def _times(checkout):
    files = (path for path in checkout.root.path.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path): path.stat().st_mtime_ns for path in files}


@pytest.mark.parametrize(("kind", "file", "bits"), PLACES)
def test_a_flipped_bit_is_found_and_named_and_repaired_with_the_same_bytes(checkout, encoded_units, kind, file, bits):
    before, times, store = checkout.files(), _times(checkout), checkout.store(kind, 1)
    path = store / file if file else store
    whole = path.read_bytes()
    for place, bit in bits.items():
        path.write_bytes(whole)
        flip(path, place, bit)
        result = checkout.run("verify", "--json")
        found = result.document["findings"]
        assert result.code == 1 and not result.document["ok"], place
        assert {(it["kind"], it["path"]) for it in found} == {(kind, str(store))}, place
        assert all(str(store) in it["problem"] for it in found)
        assert "tokens/c" not in file or "chunk 0 (steps 0 to 8, episode " in found[0]["problem"]
    result = checkout.run("verify", "--repair", "--json", checkout.recordings)
    assert result.code == 0 and result.document["repair"]["repaired"] == [str(store)], result
    assert checkout.files() == before and len(encoded_units) == (kind == "tokens")
    touched = {path for path, time in _times(checkout).items() if times.get(path) != time}
    assert all(path == str(store) or path.startswith(f"{store}/") for path in touched)


def test_what_is_missing_is_named_and_made_again(checkout, encoded_units):
    before, lost = checkout.files(), {}
    for kind, path in (
        ("tokens", checkout.tokens(2)),
        ("actions", checkout.actions(1)),
        ("controls", checkout.controls(0)),
        ("manifest", checkout.root.manifest(checkout.manifest.digest)),
    ):
        path.unlink() if path.is_file() else shutil.rmtree(path)
        lost[kind] = str(path)
    findings = checkout.run("verify", "--json").document["findings"]
    assert {finding["kind"]: finding["path"] for finding in findings} == lost and len(findings) == 4
    assert checkout.run("verify", "--repair", checkout.recordings).code == 0
    assert checkout.files() == before and len(encoded_units) == 1
    for kind in ("tokens", "actions", "controls", "manifests"):
        shutil.rmtree(checkout.root.path / kind)
    assert checkout.run("verify", "--repair", checkout.recordings).code == 0 and checkout.files() == before


def test_what_cannot_be_made_again_is_left_as_it_is_and_told(checkout):
    number = _number(checkout, "b.tar")
    digest, path = checkout.manifest.entries[number].unit_digest, checkout.recordings / "b.tar"
    flip(checkout.tokens(number) / "tokens/c/0/0/0", 100)
    before = checkout.files()
    result = checkout.run("verify", "--repair", checkout.recordings, "encode.fps=4")
    assert result.code == 2 and "sampling.fps: 5.0 -> 4.0" in result.err and checkout.files() == before
    path.rename(checkout.folder / "elsewhere.tar")
    result = checkout.run("verify", "--repair", "--json", checkout.recordings)
    assert result.code == 1 and result.document["repair"]["lost"] == [digest] and checkout.files() == before
    assert "NOT REPAIRED" in checkout.run("verify", "--repair", checkout.recordings).out
    assert checkout.run("verify", "--repair", checkout.folder / "elsewhere.tar").code == 0


def test_a_unit_of_which_every_recording_was_skipped_is_repaired(fresh):
    write_vpt_tar(fresh.recordings / "short.tar", {"s": (b"no video", b"{}\n")})
    fresh.encode("encode.max_skipped_share=0.5")
    before = fresh.files()
    number = next(n for n, entry in enumerate(fresh.manifest.entries) if entry.num_steps == 0)
    (fresh.tokens(number) / "steps.parquet").unlink()
    result = fresh.run("verify", "--repair", fresh.recordings, "encode.max_skipped_share=0.5")
    assert result.code == 0 and fresh.files() == before


@pytest.mark.parametrize("kind", ["tokens", "actions", "controls"])
def test_what_another_process_has_made_again_meanwhile_is_left_alone(checkout, encoded_units, monkeypatch, kind):
    """The other one holds the claim while damage is looked for, and has put the store right when it lets go."""
    path, before = getattr(checkout, kind)(1), checkout.files()
    damaged = path if path.is_file() else path / "store.json"
    content, inode = damaged.read_bytes(), path.stat().st_ino
    damaged.write_bytes(content[:-9])
    found, other, open_encoder = threading.Event(), checkout.root.claim(path), verification.open_encoder
    monkeypatch.setattr(verification, "open_encoder", lambda *given: found.set() or open_encoder(*given))

    def put_right():
        assert found.wait(60)
        damaged.write_bytes(content)
        other.release()

    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(put_right)
        assert checkout.run("verify", "--repair", checkout.recordings).code == 0
        work.result()
    assert path.stat().st_ino == inode and checkout.files() == before and encoded_units == []


def test_a_store_of_another_recording_than_its_name_says_is_found_against_online_and_repaired(fresh, encoded, tmp_path):
    tar, kept = fresh.recordings / "b.tar", shutil.copy(fresh.recordings / "b.tar", tmp_path)
    other = write_vpt_tar(tmp_path / "other.tar", {"z": make_vpt_pair(41, 99)})
    replace_behind_the_table(DigestTable(), tar, other.read_bytes())
    fresh.encode()
    shutil.copy(kept, tar)
    assert fresh.run("verify", fresh.recordings).code == 0
    number = _number(fresh, "b.tar")
    stale, listed = fresh.tokens(number), fresh.manifest.entries[number].tokens_digest
    online = ("verify", "--against-online", "60", fresh.recordings)
    result = fresh.run(*online)
    assert result.code == 1 and f"{stale} is of another recording" in result.out
    (options,) = re.findall(r"next: jepa-cache verify (--repair --against-online 60 --seed \d+ .*)", result.out)
    result = fresh.run("verify", *options.split())  # with the recordings
    assert result.code == 1 and re.search(rf"ANOTHER DIGEST: {stale} .* lists {listed}", result.out), result
    fresh.encode()
    assert fresh.manifest == encoded.manifest
    assert "all is as it was written" in fresh.run(*online).out


def test_a_shard_whose_chunks_are_whole_but_lie_elsewhere_is_found_by_reading_whole_files_alone(checkout):
    """Two chunks change places, in the index too: every number reads as it was written."""
    import google_crc32c

    path, size = checkout.tokens(0) / "tokens/c/0/0/0", 8 * 16 * 64 * 2 + 4
    content = bytearray(path.read_bytes())
    content[: 2 * size] = content[size : 2 * size] + content[:size]
    start = len(content) - 4 - 64 * 16
    content[start : start + 24] = (
        content[start + 16 : start + 24] + content[start + 8 : start + 16] + content[start : start + 8]
    )
    content[-4:] = google_crc32c.value(bytes(content[start:-4])).to_bytes(4, "little")
    path.write_bytes(content)
    assert checkout.run("verify").code == 0
    result = checkout.run("verify", "--read-data")
    assert result.code == 1 and "sha256 differs" in result.out


def test_random_steps_encoded_again_are_bit_equal_each_in_the_batch_that_it_was_in(checkout, monkeypatch):
    """Episodes of 12, 10, 11 and 15 steps in batches of 8; another batch size may round otherwise."""
    sizes, encode = [], FrozenEncoder.encode
    monkeypatch.setattr(FrozenEncoder, "encode", lambda self, groups: sizes.append(len(groups)) or encode(self, groups))

    def compare(num_steps, *options):
        result = checkout.run(
            "verify", "--against-online", str(num_steps), "--json", *map(str, options), checkout.recordings
        )
        assert result.code == 0
        return result.document["against_online"]

    online = compare(12)
    assert online["bit_equal"] and (online["num_equal"], online["num_steps"]) == (12, 12)
    assert online["largest_difference"] == 0 and online["changes_since"] == []
    assert len({(step["unit"], step["step"]) for step in online["steps"]}) == 12
    assert compare(12, "--seed", online["seed"]) == online
    assert compare(12, "--seed", online["seed"] + 1)["steps"] != online["steps"]
    sizes.clear()
    assert compare(999)["num_equal"] == checkout.manifest.num_steps
    assert sorted(sizes) == [2, 3, 4, 7, 8, 8, 8, 8]


@pytest.mark.parametrize(
    "settings", [("encode.dtype=bfloat16",), ("encode.dtype=int4",), ("encode.mode=clip", *CLIPS)], ids=lambda it: it[0]
)
def test_steps_in_other_stored_dtypes_and_in_clips_are_bit_equal_too_and_what_else_changed_is_told(fresh, settings):
    for name in ("a", "c"):
        (fresh.recordings / f"{name}.tar").unlink()
    fresh.encode(*settings)
    with store_json(fresh.tokens()) as document:
        document["provenance"]["versions"]["av"] = "1.2.3"
    online = fresh.run("verify", "--against-online", "4", "--json", fresh.recordings, *settings).document[
        "against_online"
    ]
    assert online["bit_equal"] and [it for it in online["changes_since"] if it.startswith("versions.av: '1.2.3' ->")]


def test_what_cannot_be_compared_is_wrong_usage(checkout, tmp_path, monkeypatch):
    other = make_tars(tmp_path / "others", {"o": {"q": 20}}, first_seed=50)
    for options, said in (
        (("--against-online", "2", checkout.recordings, "encode.fps=4"), "sampling.fps: 5.0 -> 4.0"),
        (("--against-online", "2", other), "none of the recordings"),
    ):
        result = checkout.run("verify", *options)
        assert result.code == 2 and said in result.err
    with monkeypatch.context() as patch:
        patch.setattr(VptSource, "iter_episodes", lambda self, unit: iter(()))
        result = checkout.run("verify", "--against-online", "3", checkout.recordings)
        assert result.code == 2 and "does not hold the episode" in result.err
    path = checkout.root.manifest(checkout.manifest.digest)
    checkout.manifest_path.unlink()
    assert checkout.run("verify", "--manifest", path).code == 0
    result = checkout.run("verify", "--json")
    assert result.code == 2 and "is missing; run `python stages/encode.py` first" in result.document["error"]


def test_a_difference_that_is_no_number_is_wrong():
    step = StepResult("a.tar", "x", 0, equal=False, difference=0.0, relative_error=math.nan)
    assert Comparison(0, [step._replace(relative_error=0.01), step]).wrong == [step]
