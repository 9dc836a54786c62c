"""Claims, for every source that list_sources finds: it keeps the promises of `Source` and `Episode`.

Its data come from tests/sources/examples.py; a source without an example there fails.
"""

import contextlib
import dataclasses
import gc
import importlib
import inspect
import json
import os
from pathlib import Path

import numpy as np
import pytest

from jepa_cache.actions import get_action_space
from jepa_cache.episode import Episode, Skipped
from jepa_cache.media.probe import probe_video
from jepa_cache.sources import build_source, list_sources
from tests.sources import examples

FOUND = {
    f"{name}-{form}": (name, example)
    for name in list_sources()
    if hasattr(examples, name)
    for form, example in getattr(examples, name)().items()
}
NUM_RECORDINGS = 150
MAX_GROWTH_BYTES = 12 << 20
"""From a third of the way to its end: 120 kB a recording. glibc returns memory in pieces."""


@pytest.fixture(params=FOUND)
def case(request, tmp_path):
    """(source, example, folder with the recordings of seeds 0 to 2)."""
    name, example = FOUND[request.param]
    example.write(tmp_path / "input", range(3))
    return build_source(name, example.options), example, tmp_path / "input"


def read_all(source, folder):
    return [item for unit in source.list_units([str(folder)], folder) for item in source.iter_episodes(unit)]


def list_files(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("name", list_sources())
def test_every_source_has_an_example(name):
    assert hasattr(examples, name), f"tests/sources/examples.py needs a function {name}() for the source {name}"


@pytest.mark.parametrize("form", FOUND)
def test_every_option_enters_the_recipe_and_an_unknown_one_is_refused_with_the_nearest(form):
    name, example = FOUND[form]
    recipes = [build_source(name, options).recipe for options in (example.options, *example.changes)]
    texts = [json.dumps(recipe, sort_keys=True) for recipe in recipes]
    assert len(set(texts)) == len(texts) and json.loads(texts[0]) == recipes[0]
    assert recipes[0]["source"] == name and isinstance(recipes[0]["recipe_version"], int)
    module = importlib.import_module(f"jepa_cache.sources.{name}")
    (options,) = [
        cls
        for _, cls in inspect.getmembers(module, dataclasses.is_dataclass)
        if cls.__module__ == module.__name__ and cls.__name__.endswith("Options")
    ]
    known = [option.name for option in dataclasses.fields(options)]
    changed = [key for change in example.changes for key in known if change.get(key) != example.options.get(key)]
    assert set(known) == set(changed)
    wrong = known[0][:-1] if known else "camera"
    with pytest.raises(ValueError, match="unknown key") as caught:
        module.build({**example.options, wrong: 1})
    assert (repr(known[0]) if known else name) in str(caught.value)


def test_units_are_found_in_one_order_with_files_that_exist(case):
    source, _, folder = case
    units = source.list_units([str(folder)], folder)
    assert units
    assert units == source.list_units([str(folder)], folder)
    assert units == source.list_units(["."], folder)
    assert all(isinstance(path, Path) and path.is_file() for unit in units for path in unit.files)
    assert len({unit.files for unit in units}) == len({unit.name for unit in units}) == len(units)


def test_a_folder_that_cannot_be_read_is_refused_by_name(case, monkeypatch):
    """Root reads every folder, so the refusal is the system call's."""
    source, _, folder = case
    (folder / "deep/locked").mkdir(parents=True)
    real = os.scandir

    def scandir(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"1 folders below .* cannot be read.*deep/locked \(Permission denied\)"):
        source.list_units([str(folder)], folder)


def test_a_skipped_recording_is_called_by_its_present_name_after_its_folders_were_renamed(case, tmp_path):
    source, example, folder = case
    example.damage(folder, 1)
    name_skipped = getattr(source, "name_skipped", lambda unit, key: key)

    def list_skipped(folder):
        units = source.list_units([str(folder)], folder)
        return [(unit, item.key) for unit in units for item in source.iter_episodes(unit) if isinstance(item, Skipped)]

    before = list_skipped(folder)
    assert before and all(name_skipped(unit, key) == key for unit, key in before)
    folder.rename(tmp_path / "renamed")
    for child in [child for child in (tmp_path / "renamed").iterdir() if child.is_dir()]:
        child.rename(child.with_name(f"{child.name}-too"))
    after = list_skipped(tmp_path / "renamed")
    assert [name_skipped(unit, key) for (unit, _), (_, key) in zip(after, before, strict=True)] == [
        key for _, key in after
    ]


def test_a_unit_keeps_its_files_and_episodes_when_recordings_are_added(case):
    source, example, folder = case
    before = {
        unit.files: [item.key for item in source.iter_episodes(unit)] for unit in source.list_units(["."], folder)
    }
    contents = {path: path.read_bytes() for files in before for path in files}
    example.write(folder, range(5))
    units = source.list_units(["."], folder)
    after = {unit.files: [item.key for item in source.iter_episodes(unit)] for unit in units}
    assert len(after) > len(before)
    assert before.items() <= after.items()
    assert all(path.read_bytes() == content for path, content in contents.items())


def test_a_new_source_object_finds_equal_episodes_in_a_unit_alone_whatever_it_is_called(case):
    """Units go to other processes and runs: nothing but the unit's files and the options may be needed."""
    source, example, folder = case
    for unit in source.list_units(["."], folder):
        fresh = build_source(source.recipe["source"], example.options)
        others = fresh.iter_episodes(unit._replace(name="other"))
        for one, other in zip(source.iter_episodes(unit), others, strict=True):
            for attribute in ("key", "fps", "num_video_frames", "notes", "first_frame", "video"):
                assert getattr(one, attribute) == getattr(other, attribute)
            assert np.array_equal(one.frame_ticks, other.frame_ticks)
            assert list(one.controls) == list(other.controls)
            for name, column in one.controls.items():
                assert column.dtype == other.controls[name].dtype
                assert np.array_equal(column, other.controls[name], equal_nan=column.dtype.kind == "f")


def test_all_recordings_of_the_example_are_usable_with_keys_frames_and_rows_of_their_own(case):
    source, example, folder = case
    episodes, space = read_all(source, folder), get_action_space(example.action_space)
    assert not [item for item in episodes if isinstance(item, Skipped)]
    keys = [episode.key for episode in episodes]
    assert len(set(keys)) == len(keys) >= 3
    assert not any(str(folder) in key or key.startswith("/") for key in keys)
    for episode in episodes:
        times_s = np.arange(len(episode.frame_ticks)) / episode.fps
        assert np.abs(episode.frame_ticks / example.rows_hz - times_s).max() <= 1 / min(example.rows_hz, episode.fps)
        info = probe_video(episode.video)
        assert episode.first_frame + episode.num_video_frames <= info.num_frames
        assert episode.fps == info.fps or any("Hz" in note for note in episode.notes)
        actions, states = space.aggregate(episode.controls, episode.frame_ticks[::3])
        assert np.isfinite(actions).all() and np.isfinite(states).all() and np.abs(actions).sum() > 0
        check_columns(episode)


def check_columns(episode):
    """Plain columns of one length that own their memory: a view of a batch or file would keep the whole of it alive."""
    assert {column.shape for column in episode.controls.values()} == {(episode.num_ticks,)}
    for name, column in episode.controls.items():
        expected = {"gui": "b", "success": "b", "idle": "f"}.get(name, "biuf")
        assert column.dtype.kind in expected and (name != "idle" or set(column) <= {0, 1})
        base = column
        while isinstance(base.base, np.ndarray):
            base = base.base
        assert base.nbytes <= 4 * column.nbytes * len(episode.controls), name


def test_a_broken_recording_is_skipped_with_a_reason_others_go_on_and_nothing_is_written_beside_them(case):
    source, example, folder = case
    before = [item.key for item in read_all(source, folder)]
    example.damage(folder, 1)
    files = list_files(folder)
    after = read_all(source, folder)
    assert list_files(folder) == files
    skipped = [item for item in after if isinstance(item, Skipped)]
    assert skipped
    assert all(len(item.reason) > 20 for item in skipped)
    assert sorted(item.key for item in after) == sorted(before)
    assert len(skipped) <= len(before) / 3


def test_an_input_that_holds_nothing_is_refused(case, tmp_path):
    source, _, _ = case
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        source.list_units(["empty"], tmp_path)


def held(folder):
    """(resident bytes of this process, its open files in `folder`); decoders, HDF5 and Arrow allocate outside of Python.

    Files elsewhere are not counted: threads of earlier tests in this process may open and close theirs at any time.
    """
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    targets = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            targets.append(str(link.readlink()))
    return pages * os.sysconf("SC_PAGE_SIZE"), [target for target in targets if target.startswith(str(folder))]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc, which only Linux has")
@pytest.mark.parametrize("form", FOUND)
def test_hundreds_of_recordings_leave_neither_memory_nor_open_files_behind(form, tmp_path):
    """After a third, long enough to fill every cache that has a bound. benchmarks/sources.py --long does it over thousands."""
    name, example = FOUND[form]
    example.write(tmp_path, range(10))
    source = build_source(name, example.options)
    number, marks = 0, []
    while number < NUM_RECORDINGS:
        for unit in source.list_units(["."], tmp_path):
            for recording in source.iter_episodes(unit):
                assert isinstance(recording, Episode)
                recording = None
                number += 1
                if number in (NUM_RECORDINGS // 3, NUM_RECORDINGS):
                    marks.append(held(tmp_path))
    (early_bytes, early_files), (late_bytes, late_files) = marks
    assert late_bytes - early_bytes < MAX_GROWTH_BYTES, f"{(late_bytes - early_bytes) / 2**20:.1f} MiB more are held"
    assert len(late_files) <= len(early_files), f"more files are open: {sorted(late_files)}"
