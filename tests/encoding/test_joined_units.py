"""Claims of `encode.episodes_per_unit`: many small recordings share a store, with the tokens that each has alone.

One more recording changes one unit; one that cannot be read takes no other with it.
"""

import shutil

import numpy as np
import pytest

from jepa_cache.config.loading import load_config
from jepa_cache.data.dataset import CachedDataset
from jepa_cache.encoding.run import encode_dataset
from jepa_cache.encoding.units import join_units, name_skipped
from jepa_cache.encoding.verification import compare_online
from jepa_cache.episode import Skipped
from jepa_cache.sources import build_source
from jepa_cache.store.root import CacheRoot
from tests.encoded import tiniest_config
from tests.sources import examples
from tests.workspace import SUITE_SETTINGS

FOUND = {"droid_raw": ("droid_raw", examples.droid_raw), "mp4_json": ("mp4_json", examples.mp4_json)}


def write(name, folder, seeds):
    """The source of an example, and its units below a folder."""
    example = next(iter(FOUND[name][1]().values()))
    example.write(folder, seeds)
    source = build_source(name, example.options)
    return source, example, source.list_units([str(folder)], folder)


@pytest.mark.parametrize("name", FOUND)
def test_joined_units_hold_the_same_episodes_and_one_more_recording_changes_one(name, tmp_path):
    source, example, units = write(name, tmp_path / "in", range(12))
    assert join_units(source, units, 1) == units
    joined = join_units(source, units, 4)
    assert 1 < len(joined) < len(units)
    alone = [recording.key for unit in units for recording in source.iter_episodes(unit)]
    assert alone == [recording.key for unit in joined for recording in source.iter_episodes(unit)]
    assert [file for unit in units for file in unit.files] == [file for unit in joined for file in unit.files]
    example.write(tmp_path / "in", range(12, 13))
    more = join_units(source, source.list_units([str(tmp_path / "in")], tmp_path), 4)
    assert len({unit.files for unit in joined} - {unit.files for unit in more}) <= 1


@pytest.mark.parametrize("name", FOUND)
def test_what_cannot_be_read_stays_alone_and_a_bad_recording_takes_no_other_with_it(name, tmp_path):
    source, example, units = write(name, tmp_path / "in", range(8))
    example.damage(tmp_path / "in", 3)
    units = source.list_units([str(tmp_path / "in")], tmp_path)
    read = [recording for unit in join_units(source, units, 64) for recording in source.iter_episodes(unit)]
    assert [type(recording).__name__ for recording in read].count("Skipped") == 1 and len(read) == 8
    (skipped,) = (recording.key for recording in read if isinstance(recording, Skipped))
    (joined,) = join_units(source, units, 64)[-1:]
    assert name_skipped(source, units[0], "earlier") == units[0].name
    assert name_skipped(source, joined, skipped) == skipped
    gone = units[5].files[-1]
    gone.unlink()
    gone.symlink_to(tmp_path / "nowhere")
    joined = join_units(source, units, 64)
    assert units[5] in joined and not any(gone in unit.files for unit in joined if unit != units[5])


def test_a_store_of_several_recordings_holds_the_tokens_that_each_has_alone(tmp_path):
    write("mp4_json", tmp_path / "in", range(6))
    found = {}
    for size in (1, 64):
        config = load_config(
            SUITE_SETTINGS,
            ["dataset=mp4_json", "encoder=tiny", "encode.device=cpu", f"encode.episodes_per_unit={size}"],
        )
        root = CacheRoot(tmp_path / f"cache-{size}")
        manifest = encode_dataset(config, [str(tmp_path / "in")], base=tmp_path, root=root).manifest
        dataset = CachedDataset(manifest, root)
        found[size] = {}
        for segment in dataset.segments:
            tokens = np.empty((segment.stop - segment.start, manifest.num_tokens, manifest.width), np.float16)
            dataset.read_tokens(segment.store, segment.start, tokens)
            found[size][segment.episode, segment.stop - segment.start] = tokens, *dataset.controls_of(segment)
        assert len(manifest.entries) == (6 if size == 1 else 1)
    assert found[1].keys() == found[64].keys() and len(found[1]) == 6
    for key, (tokens, *controls) in found[1].items():
        other, *others = found[64][key]
        np.testing.assert_allclose(tokens.astype(np.float32), other.astype(np.float32), atol=4e-3)
        assert all(np.array_equal(mine, its) for mine, its in zip(controls, others, strict=True))


@pytest.mark.parametrize("size", [1, 64])
def test_another_recipe_and_controls_made_anew_keep_the_first_names_after_a_folder_was_renamed(tmp_path, size):
    write("mp4_json", tmp_path / "in/monday", range(3))
    root = CacheRoot(tmp_path / "cache")

    def encode(fps):
        config = tiniest_config("mp4_json", episodes_per_unit=size, fps=fps)
        manifest = encode_dataset(config, [str(tmp_path / "in")], base=tmp_path, root=root).manifest
        dataset = CachedDataset(manifest, root)
        kept = [dataset.read_native_controls(store) for store in range(len(manifest.entries))]
        rows = {segment.episode: dataset.controls_of(segment)[0] for segment in dataset.segments}
        return config, manifest, rows, {key for some in kept for key in some}

    _, _, first, names = encode(5)
    (tmp_path / "in/monday").rename(tmp_path / "in/tuesday")
    config, manifest, _, other_names = encode(10)
    assert other_names == names and {*first} == names == {f"monday/{seed:03d}" for seed in range(3)}
    compared = compare_online(manifest, config, [str(tmp_path / "in")], root, base=tmp_path, num_steps=8, seed=0)
    assert len(compared.steps) == 8 and not compared.wrong
    for file in (root.path / "controls").rglob("*.parquet"):
        file.unlink()
    for store in (root.path / "actions").glob("*/*"):
        shutil.rmtree(store)
    _, _, again, kept = encode(5)
    assert kept == names and all(np.array_equal(again[key], first[key]) for key in first)
