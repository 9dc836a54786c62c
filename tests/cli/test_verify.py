"""Claims of `jepa-cache verify`: whatever byte of what a manifest lists is missing or flipped is found and named.

The message names store, chunk and episode and says what to type; a subset says so; an interrupted run goes on and a complete one
forgets; steps that are encoded again are bit-equal, and stores of other pixels are not.
"""

import json
import math
import shutil
from itertools import combinations

import numpy as np
import pytest

from jepa_cache.encoding.verification import Comparison, StepResult
from jepa_cache.store import rounds
from jepa_cache.store.digests import DigestTable
from jepa_cache.store.recipe import canonical_json
from tests.encoded import make_tars, replace_behind_the_table, write_store_json
from tests.makers import make_vpt_pair, write_vpt_tar

CLASSES = {
    "token data": ("tokens", "tokens/c/0/0/0", 100),
    "chunk checksum": ("tokens", "tokens/c/0/0/0", 8 * 16 * 64 * 2 + 2),
    "shard index": ("tokens", "tokens/c/0/0/0", -100),
    "index checksum": ("tokens", "tokens/c/0/0/0", -2),
    "array metadata": ("tokens", "tokens/zarr.json", 60),
    "group metadata": ("tokens", "zarr.json", 60),
    "step table": ("tokens", "steps.parquet", 200),
    "segment table": ("tokens", "segments.parquet", 40),
    "card": ("tokens", "store.json", 300),
    "card's first byte": ("tokens", "store.json", 0),
    "actions": ("actions", "actions/c/0/0", 50),
    "states' metadata": ("actions", "states/zarr.json", 60),
    "actions' card": ("actions", "store.json", 200),
    "controls": ("controls", "", 400),
    "controls' end": ("controls", "", -2),
}


def flip(path, place, bit=2):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def test_a_whole_cache_is_told_to_be_so_and_not_changed(checkout):
    before = checkout.files()
    result = checkout.run("verify", "--json")
    assert result.code == 0 and result.document["ok"] and result.document["findings"] == []
    assert result.document["num_checked"] == result.document["num_units"] == 3
    shards = sum(len(content) for name, content in before.items() if "tokens/c/" in name)
    assert 0.99 * shards < result.document["num_bytes"] <= shards
    assert checkout.files() == before
    assert checkout.run("verify", "--read-data").code == 0


@pytest.mark.parametrize("name", CLASSES)
def test_a_flipped_bit_of_every_byte_class_is_found_and_named(checkout, name):
    kind, file, place = CLASSES[name]
    store = getattr(checkout, kind)(1)
    flip(store / file if file else store, place)
    result = checkout.run("verify", "--json")
    assert result.code == 1 and not result.document["ok"]
    kinds = {finding["kind"] for finding in result.document["findings"]}
    assert kind in kinds and all(finding["place"] == str(store) for finding in result.document["findings"])
    assert all(str(store) in finding["problem"] for finding in result.document["findings"])


@pytest.mark.parametrize("place", [5, 31, 45])
def test_any_flipped_bit_in_the_first_bytes_of_a_card_is_found(checkout, place):
    """Where JSON ends, where keys are misread, and in the format's number, which must not pass for another version."""
    path = checkout.tokens() / "store.json"
    for bit in (0, 3, 6):
        flip(path, place, bit)
        assert checkout.run("verify").code == 1, (place, bit, path.read_bytes()[:80])
        flip(path, place, bit)


def test_a_flipped_format_number_is_damage_and_another_version_is_not(checkout):
    path = checkout.tokens() / "store.json"
    text = path.read_text()
    path.write_text(text.replace('"format_version": 1', '"format_version": 3'))
    result = checkout.run("verify")
    assert result.code == 1 and "the format version in its store.json is damaged" in result.out
    document = json.loads(text)
    document["content"]["format_version"] = 3
    document["content"]["card"]["new_field"] = True
    path.write_bytes(canonical_json(document))
    result = checkout.run("verify")
    assert result.code == 2 and "has store format 3" in result.err


def test_damage_in_a_chunk_names_chunk_steps_and_episode(checkout):
    flip(checkout.tokens(0) / "tokens/c/0/0/0", (8 * 16 * 64 * 2 + 4) + 10)
    text = checkout.run("verify").out
    assert "chunk 1 (steps 8 to " in text and "episode" in text and "next: jepa-cache repair" in text


@pytest.mark.parametrize("kind", ["tokens", "actions", "controls"])
def test_what_is_missing_is_named(checkout, kind):
    place = getattr(checkout, kind)(2)
    place.unlink() if place.is_file() else shutil.rmtree(place)
    result = checkout.run("verify", "--json")
    assert result.code == 1
    assert [(finding["kind"], finding["place"]) for finding in result.document["findings"]] == [(kind, str(place))]


def test_a_store_that_is_another_one_than_listed_is_found(checkout):
    shutil.rmtree(checkout.tokens(0))
    shutil.copytree(checkout.tokens(1), checkout.tokens(0))
    result = checkout.run("verify")
    assert result.code == 1 and "is not the store that its path says" in result.out


def test_a_root_without_its_copy_of_the_manifest_is_found(checkout):
    checkout.root.manifest(checkout.manifest.digest).unlink()
    result = checkout.run("verify", "--json")
    assert result.code == 1 and [finding["kind"] for finding in result.document["findings"]] == ["manifest"]


def test_a_chunk_that_was_changed_together_with_its_checksum_is_found(checkout):
    import google_crc32c

    path = checkout.tokens(0) / "tokens/c/0/0/0"
    content = bytearray(path.read_bytes())
    chunk = 8 * 16 * 64 * 2
    content[:chunk] = bytes(chunk)
    content[chunk : chunk + 4] = google_crc32c.value(bytes(chunk)).to_bytes(4, "little")
    path.write_bytes(content)
    result = checkout.run("verify")
    assert result.code == 1 and "chunk 0" in result.out and "not the one in store.json" in result.out


def test_a_shard_whose_chunks_are_whole_but_lie_elsewhere_is_found_by_reading_whole_files_alone(checkout):
    """Two chunks change places, in the index too: every number reads as it was written."""
    import google_crc32c

    path, size = checkout.tokens(0) / "tokens/c/0/0/0", 8 * 16 * 64 * 2 + 4
    content = bytearray(path.read_bytes())
    content[: 2 * size] = content[size : 2 * size] + content[:size]
    start = len(content) - 4 - 64 * 16
    content[start : start + 8], content[start + 16 : start + 24] = (
        content[start + 16 : start + 24],
        content[start : start + 8],
    )
    content[-4:] = google_crc32c.value(bytes(content[start:-4])).to_bytes(4, "little")
    path.write_bytes(content)
    assert checkout.run("verify").code == 0
    result = checkout.run("verify", "--read-data")
    assert result.code == 1 and "sha256 differs" in result.out


def test_another_units_shard_is_found_in_a_store_that_does_not_list_its_checksums(checkout):
    """As stores were made by earlier states of this program."""
    shards = [checkout.tokens(number) / "tokens/c/0/0/0" for number in range(3)]
    ours, theirs = next(pair for pair in combinations(shards, 2) if len({it.stat().st_size for it in pair}) == 1)
    path = ours.parents[4] / "store.json"
    document = json.loads(path.read_bytes())
    del document["crc32c"]
    write_store_json(path, document)
    assert checkout.run("verify").code == 0
    shutil.copy(theirs, ours)
    result = checkout.run("verify")
    assert result.code == 1 and "sha256 differs" in result.out


@pytest.mark.parametrize("kind", ["tokens", "actions", "controls"])
def test_the_files_of_another_unit_are_found(checkout, kind):
    ours, theirs = getattr(checkout, kind)(0), getattr(checkout, kind)(1)
    pairs = (
        [(ours, theirs)]
        if ours.is_file()
        else [(file, theirs / file.relative_to(ours)) for file in sorted(ours.rglob("*")) if file.is_file()]
    )
    for file, other in pairs:
        content = file.read_bytes()
        if other.read_bytes() == content:
            continue
        file.write_bytes(other.read_bytes())
        result = checkout.run("verify", "--fresh")
        assert result.code == 1 and ours.stem in result.out, file
        file.write_bytes(content)
    assert checkout.run("verify", "--fresh").code == 0


def test_a_subset_reads_so_much_and_says_so_and_tables_are_always_read(checkout):
    result = checkout.run("verify", "--subset", "10%", "--seed", "3", "--json")
    whole = checkout.run("verify", "--json").document["num_bytes"]
    assert result.code == 0 and 0 < result.document["num_bytes"] < whole
    assert (result.document["share"], result.document["seed"]) == (0.1, 3)
    assert checkout.run("verify", "--subset", "0.1", "--seed", "3", "--json").document == result.document
    flip(checkout.tokens(2) / "steps.parquet", 200)
    assert checkout.run("verify", "--subset", "1%").code == 1


@pytest.mark.parametrize("text", ["0%", "101%", "-5%", "all", "nan"])
def test_a_share_that_is_none_is_wrong_usage(checkout, text):
    result = checkout.run("verify", f"--subset={text}")
    assert result.code == 2 and "--subset is a share" in result.err


def _interrupt(monkeypatch, number):
    """The n-th unit's check is interrupted by the user."""
    check, count = rounds.Audit.check, []

    def checked(self, part, entry):
        count.append(entry)
        if len(count) == number:
            raise KeyboardInterrupt
        return check(self, part, entry)

    monkeypatch.setattr(rounds.Audit, "check", checked)


def test_an_interrupted_run_goes_on_and_a_complete_one_starts_over(checkout, monkeypatch):
    with monkeypatch.context() as patch:
        _interrupt(patch, 3)
        result = checkout.run("verify", "--json")
        assert result.code == 2 and "interrupted" in result.document["error"]
    document = checkout.run("verify", "--json").document
    assert (document["num_checked"], document["num_checked_before"]) == (1, 2)
    assert checkout.run("verify", "--json").document["num_checked"] == 3


def test_what_was_touched_since_an_interrupted_run_is_read_again(checkout, monkeypatch):
    with monkeypatch.context() as patch:
        _interrupt(patch, 3)
        checkout.run("verify")
    flip(checkout.tokens(0) / "tokens/c/0/0/0", 100)
    result = checkout.run("verify", "--json")
    assert result.code == 1 and result.document["num_checked"] == 2


def test_fresh_forgets_an_interrupted_run(checkout, monkeypatch):
    with monkeypatch.context() as patch:
        _interrupt(patch, 3)
        checkout.run("verify")
    assert checkout.run("verify", "--fresh", "--json").document["num_checked"] == 3


def test_after_damage_only_that_is_read_again(checkout):
    flip(checkout.tokens(1) / "tokens/c/0/0/0", 100)
    checkout.run("verify")
    document = checkout.run("verify", "--json").document
    assert (document["num_checked"], document["num_checked_before"]) == (1, 2)


def test_random_steps_encoded_again_are_bit_equal(checkout):
    result = checkout.run("verify", "--against-online", "12", "--json", checkout.recordings)
    online = result.document["against_online"]
    assert result.code == 0 and online["bit_equal"] and (online["num_equal"], online["num_steps"]) == (12, 12)
    assert online["largest_difference"] == 0 and online["batch_shape_difference"] >= 0
    assert online["changes_since"] == []
    assert len({(step["unit"], step["step"]) for step in online["steps"]}) == 12
    again = checkout.run(
        "verify", "--against-online", "12", "--json", "--seed", str(online["seed"]), checkout.recordings
    )
    assert again.document["against_online"] == online


def test_each_step_is_encoded_in_the_batch_that_it_was_in_and_alone(checkout, monkeypatch):
    """Episodes of 12, 10, 11 and 15 steps in batches of 8, of which every step is asked for; another shape may round otherwise."""
    from jepa_cache.encoder.frozen import FrozenEncoder

    sizes, encode = [], FrozenEncoder.encode
    monkeypatch.setattr(FrozenEncoder, "encode", lambda self, groups: sizes.append(len(groups)) or encode(self, groups))
    result = checkout.run("verify", "--against-online", "999", "--json", checkout.recordings)
    num_steps = checkout.manifest.num_steps
    assert result.document["against_online"]["num_equal"] == num_steps == sizes.count(1)
    assert sorted(size for size in sizes if size > 1) == [2, 3, 4, 7, 8, 8, 8, 8]


@pytest.mark.parametrize("dtype", ["bfloat16", "int4"])
def test_steps_in_other_stored_dtypes_are_bit_equal_too(fresh, dtype):
    for name in ("a", "c"):
        (fresh.recordings / f"{name}.tar").unlink()
    fresh.encode(f"encode.dtype={dtype}")
    result = fresh.run("verify", "--against-online", "4", "--json", fresh.recordings, f"encode.dtype={dtype}")
    assert result.code == 0 and result.document["against_online"]["bit_equal"]


def test_steps_of_a_clip_are_compared_in_their_clip(fresh):
    (fresh.recordings / "a.tar").unlink()
    clip = ("encode.mode=clip", "encode.frames_per_clip=4", "train.window_steps=2", "train.auto_steps=1")
    clip = (*clip, "evaluate.num_context_steps=1", "evaluate.horizon=1")
    fresh.encode(*clip)
    result = fresh.run("verify", "--against-online", "6", "--json", fresh.recordings, *clip)
    assert result.code == 0 and result.document["against_online"]["bit_equal"], result.document


def test_tokens_of_other_pixels_are_found(checkout, monkeypatch):
    from jepa_cache.encoding import verification

    open_video = verification.open_video

    class Darker:
        def __init__(self, video):
            self.video = video

        def read(self, indices):
            return self.video.read(indices)[:, ::-1].copy()

        def close(self):
            self.video.close()

    monkeypatch.setattr(verification, "open_video", lambda *a, **k: Darker(open_video(*a, **k)))
    result = checkout.run("verify", "--against-online", "5", "--json", checkout.recordings)
    online = result.document["against_online"]
    assert result.code == 1 and not online["bit_equal"] and online["largest_difference"] > 0
    assert online["largest_relative_error"] > 0.1


def test_a_store_of_another_recording_than_its_name_says_is_found_against_online_and_repaired(fresh, encoded, tmp_path):
    tar, kept = fresh.recordings / "b.tar", shutil.copy(fresh.recordings / "b.tar", tmp_path)
    other = write_vpt_tar(tmp_path / "other.tar", {"z": make_vpt_pair(41, 99)})
    replace_behind_the_table(DigestTable(), tar, other.read_bytes())
    fresh.encode()
    shutil.copy(kept, tar)
    assert fresh.run("verify", str(fresh.recordings)).code == 0
    online = ("verify", "--against-online", "60", str(fresh.recordings))
    result = fresh.run(*online)
    assert result.code == 1 and "next: jepa-cache repair" in result.out
    stale = next(fresh.tokens(n) for n in range(3) if fresh.tokens(n).name == encoded_as(encoded, "b.tar"))
    assert f"{stale} is of another recording" in fresh.run("verify").out
    result = fresh.run("repair", str(fresh.recordings))
    assert result.code == 1 and "ANOTHER DIGEST" in result.out and str(stale) in result.out
    fresh.encode()
    assert fresh.manifest == encoded.manifest
    assert "all is as it was written" in fresh.run(*online).out


def encoded_as(checkout, name):
    """Name of the store of a recording."""
    return f"{DigestTable().digest(checkout.recordings / name)[:32]}.zarr"


def test_another_seed_chooses_other_steps_and_the_choice_is_the_seeds(checkout):
    def chosen(seed):
        result = checkout.run("verify", "--against-online", "4", "--json", "--seed", seed, checkout.recordings)
        return [(step["unit"], step["step"]) for step in result.document["against_online"]["steps"]]

    assert chosen("1") == chosen("1") and len({tuple(chosen(seed)) for seed in ("1", "2", "3")}) == 3


def test_what_is_another_than_recorded_is_told_with_the_encoders_own_difference(checkout, monkeypatch):
    from jepa_cache.encoder.frozen import FrozenEncoder

    for number in range(3):
        path = checkout.tokens(number) / "store.json"
        document = json.loads(path.read_bytes())
        document["provenance"]["versions"]["av"] = "1.2.3"
        write_store_json(path, document)
    encode = FrozenEncoder.encode
    monkeypatch.setattr(FrozenEncoder, "encode", lambda self, groups: encode(self, groups) + 0.25 * (len(groups) == 1))
    result = checkout.run("verify", "--against-online", "3", "--json", checkout.recordings)
    online = result.document["against_online"]
    assert result.code == 0 and online["bit_equal"] and online["batch_shape_difference"] == pytest.approx(0.25)
    assert [change for change in online["changes_since"] if change.startswith("versions.av: '1.2.3' ->")]


def test_a_recording_that_lacks_an_episode_of_its_store_is_named(checkout, monkeypatch):
    from jepa_cache.sources.vpt import VptSource

    monkeypatch.setattr(VptSource, "iter_episodes", lambda self, unit: iter(()))
    result = checkout.run("verify", "--against-online", "3", checkout.recordings)
    assert result.code == 2 and "does not hold the episode" in result.err


def test_settings_of_another_recipe_cannot_be_compared(checkout):
    result = checkout.run("verify", "--against-online", "2", checkout.recordings, "encode.fps=4")
    assert result.code == 2 and "sampling.fps: 5.0 -> 4.0" in result.err


def test_recordings_that_are_not_those_of_the_manifest_cannot_be_compared(checkout, tmp_path):
    other = make_tars(tmp_path / "others", {"o": {"q": 20}}, first_seed=50)
    result = checkout.run("verify", "--against-online", "2", other)
    assert result.code == 2 and "none of the recordings" in result.err


def test_no_manifest_cannot_be_checked(checkout):
    checkout.manifest_path.unlink()
    result = checkout.run("verify", "--json")
    assert result.code == 2 and "is missing; run `python stages/encode.py` first" in result.document["error"]


def test_another_manifest_can_be_named(checkout):
    path = checkout.root.manifest(checkout.manifest.digest)
    checkout.manifest_path.unlink()
    assert checkout.run("verify", "--manifest", path).code == 0


def test_stored_values_are_what_the_comparison_reads(checkout):
    from jepa_cache.encoding.verification import _read_row
    from jepa_cache.store.reader import TokenReader

    with TokenReader(checkout.tokens()) as reader:
        tokens = np.empty(reader.shape, np.float16)
        reader.read(0, tokens)
    assert np.array_equal(_read_row(checkout.tokens(), "tokens", 5), tokens[5])


def test_a_difference_that_is_no_number_is_wrong():
    step = StepResult("a.tar", "x", 0, equal=False, difference=0.0, relative_error=math.nan, batch_difference=0.0)
    good = step._replace(relative_error=0.01)
    assert Comparison([good, step], [], seed=0).wrong == [step]
