"""Claims, for every source that list_sources finds: it keeps the promises of `Source` and `Episode`.

Its data come from tests/sources/examples.py; a source without an example there fails.
"""

import dataclasses
import importlib
import inspect
import json
import os
import tracemalloc
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
MIB = 1 << 20


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


def test_the_recipe_is_json_and_names_source_and_version(case):
    source, _, _ = case
    assert json.loads(json.dumps(source.recipe)) == source.recipe
    assert source.recipe["source"] in list_sources()
    assert isinstance(source.recipe["recipe_version"], int)


@pytest.mark.parametrize("form", FOUND)
def test_every_option_that_changes_frames_or_controls_changes_the_recipe(form):
    name, example = FOUND[form]
    recipes = [build_source(name, options).recipe for options in (example.options, *example.changes)]
    texts = [json.dumps(recipe, sort_keys=True) for recipe in recipes]
    assert len(set(texts)) == len(texts)
    for option, value in example.neutral.items():
        assert build_source(name, {**example.options, option: value}).recipe == recipes[0]
    module = importlib.import_module(f"jepa_cache.sources.{name}")
    (options,) = [
        cls
        for _, cls in inspect.getmembers(module, dataclasses.is_dataclass)
        if cls.__module__ == module.__name__ and cls.__name__.endswith("Options")
    ]
    changed = {
        key
        for change in example.changes
        for key in {*change, *example.options}
        if change.get(key) != example.options.get(key)
    }
    assert {option.name for option in dataclasses.fields(options)} <= changed | set(example.neutral)


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


def test_two_passes_give_equal_episodes(case):
    source, _, folder = case
    first, second = read_all(source, folder), read_all(source, folder)
    assert [item.key for item in first] == [item.key for item in second]
    for one, other in zip(first, second, strict=True):
        for attribute in ("key", "fps", "num_video_frames", "notes", "first_frame", "video"):
            assert getattr(one, attribute) == getattr(other, attribute)
        assert np.array_equal(one.frame_ticks, other.frame_ticks)
        assert list(one.controls) == list(other.controls)
        for name, column in one.controls.items():
            assert column.dtype == other.controls[name].dtype
            assert np.array_equal(column, other.controls[name], equal_nan=column.dtype.kind == "f")


def test_a_new_source_object_finds_the_same_in_a_unit_alone(case):
    """Units go to other processes and runs: nothing but the unit and the options may be needed."""
    source, example, folder = case
    for unit in source.list_units(["."], folder):
        fresh = build_source(source.recipe["source"], example.options)
        assert [item.key for item in fresh.iter_episodes(unit)] == [item.key for item in source.iter_episodes(unit)]


def test_all_recordings_of_the_example_are_usable_and_have_keys_of_their_own(case):
    source, _, folder = case
    items = read_all(source, folder)
    assert not [item for item in items if isinstance(item, Skipped)]
    keys = [item.key for item in items]
    assert len(set(keys)) == len(keys) >= 3
    assert not any(str(folder) in key or key.startswith("/") for key in keys)


def test_controls_are_plain_columns_of_one_length(case):
    source, _, folder = case
    for episode in read_all(source, folder):
        assert {column.shape for column in episode.controls.values()} == {(episode.num_ticks,)}
        assert all(column.dtype.kind in "biuf" for column in episode.controls.values())
        for name, dtype in (("gui", bool), ("success", bool), ("idle", np.float32)):
            assert name not in episode.controls or episode.controls[name].dtype == dtype
        if "idle" in episode.controls:
            assert ((episode.controls["idle"] >= 0) & (episode.controls["idle"] <= 1)).all()


def test_controls_own_their_memory(case):
    """A view of a batch or file would keep the whole of it alive for as long as the episode."""
    source, _, folder = case
    for episode in read_all(source, folder):
        for name, column in episode.controls.items():
            base = column
            while isinstance(base.base, np.ndarray):
                base = base.base
            assert base.nbytes <= 4 * column.nbytes * len(episode.controls), name


def test_frames_show_rows_at_their_time(case):
    source, example, folder = case
    for episode in read_all(source, folder):
        times_s = np.arange(len(episode.frame_ticks)) / episode.fps
        assert np.abs(episode.frame_ticks / example.rows_hz - times_s).max() <= 1 / min(example.rows_hz, episode.fps)


def test_the_frames_are_in_the_container(case):
    source, _, folder = case
    for episode in read_all(source, folder):
        info = probe_video(episode.video)
        assert episode.first_frame + episode.num_video_frames <= info.num_frames
        assert episode.fps == info.fps or any("Hz" in note for note in episode.notes)


def test_its_action_space_gives_finite_actions_and_states(case):
    source, example, folder = case
    space = get_action_space(example.action_space)
    for episode in read_all(source, folder):
        actions, states = space.aggregate(episode.controls, episode.frame_ticks[::3])
        assert np.isfinite(actions).all() and np.isfinite(states).all()
        assert np.abs(actions).sum() > 0


def test_a_broken_recording_is_skipped_with_a_reason_and_others_go_on(case):
    source, example, folder = case
    before = [item.key for item in read_all(source, folder)]
    example.damage(folder, 1)
    after = read_all(source, folder)
    skipped = [item for item in after if isinstance(item, Skipped)]
    assert skipped
    assert all(len(item.reason) > 20 for item in skipped)
    assert sorted(item.key for item in after) == sorted(before)
    assert len(skipped) <= len(before) / 3


@pytest.mark.parametrize("form", FOUND)
def test_an_unknown_option_is_refused(form):
    name, example = FOUND[form]
    module = importlib.import_module(f"jepa_cache.sources.{name}")
    known = [key for change in (example.options, *example.changes) for key in change]
    wrong = f"{known[0][:-1]}" if known else "camera"
    nearest = repr(known[0]) if known else name
    with pytest.raises(ValueError, match="unknown key") as caught:
        module.build({**example.options, wrong: 1})
    assert nearest in str(caught.value)


def test_an_input_that_holds_nothing_is_refused(case, tmp_path):
    source, _, _ = case
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        source.list_units(["empty"], tmp_path)


def test_nothing_is_written_beside_the_inputs(case):
    source, _, folder = case
    before = list_files(folder)
    read_all(source, folder)
    assert list_files(folder) == before


@pytest.mark.parametrize("form", FOUND)
def test_memory_stays_flat_over_many_episodes(form, tmp_path):
    """By the byte, of what Python holds; test_long_runs.py counts everything, over more of them."""
    name, example = FOUND[form]
    example.write(tmp_path, range(20))
    source = build_source(name, example.options)
    units = source.list_units(["."], tmp_path)
    held = []
    tracemalloc.start()
    try:
        while len(held) < 60:
            for unit in units:
                for item in source.iter_episodes(unit):
                    assert isinstance(item, Episode)
                    held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    early, late = max(held[5:20]), max(held[20:])
    assert late - early < MIB / 4, f"{(late - early) / MIB:.2f} MiB more are held late than early in the run"
