"""Claims: filters cut segments by the step table and the controls; what is cut is in no window, at a step or between two.

What is not cut stays. A list of ranges keeps what it lists and nothing else; what it does not know is said.
"""

import dataclasses
import hashlib
import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jepa_cache.config.loading import REPOSITORY_ROOT, load_config
from jepa_cache.config.schema import FilterConfig
from jepa_cache.data.dataset import CachedDataset
from jepa_cache.data.filters import (
    NO_FILTER,
    cut_runs,
    find_first_act,
    join_steps,
    keep_steps,
    keep_ticks,
    needs_controls,
    ranges_path,
)
from jepa_cache.poses import JOINT_VELOCITY_CONTROLS
from jepa_cache.store import layout
from jepa_cache.store.controls import iter_controls
from jepa_cache.store.reader import read_table
from jepa_cache.store.writer import table
from tests.data.conftest import SPLIT
from tests.workspace import SUITE_SETTINGS

STRIDE = 4  # ticks from a step to the next in the encoded recordings


def steps_table(num_steps, **columns):
    base = {field.name: np.zeros(num_steps) for field in layout.STEPS_SCHEMA} | {"gui": np.zeros(num_steps, bool)}
    for name in ("frame", "tick"):
        base[name] = np.arange(num_steps)
    return table(layout.STEPS_SCHEMA, base | columns)


def filters(**changes):
    return FilterConfig(**(vars(NO_FILTER) | changes))


masks = st.lists(st.booleans(), min_size=1, max_size=40)


@given(masks, st.integers(1, 5), st.data())
def test_the_runs_are_exactly_the_kept_steps_in_pieces_of_enough_length(keep, min_steps, data):
    joined = np.array(data.draw(st.lists(st.booleans(), min_size=len(keep), max_size=len(keep))))
    keep = np.array(keep)
    start = data.draw(st.integers(0, len(keep)))
    stop = data.draw(st.integers(start, len(keep)))
    runs = cut_runs(start, stop, keep, joined, min_steps)
    covered = [step for a, b in runs for step in range(a, b)]
    assert covered == sorted(set(covered)) and all(keep[step] and start <= step < stop for step in covered)
    assert all(b - a >= min_steps for a, b in runs)
    assert all(joined[step] for a, b in runs for step in range(a, b - 1))
    for a, b in runs:  # as long as can be
        assert a == start or not (keep[a - 1] and joined[a - 1])
        assert b == stop or not (keep[b] and joined[b - 1])
    if min_steps == 1:
        assert covered == [step for step in range(start, stop) if keep[step]]


@given(masks, st.data())
def test_two_steps_are_joined_where_no_tick_between_them_was_dropped(keep, data):
    keep = np.array(keep)
    anchors = np.array(sorted(data.draw(st.lists(st.integers(0, len(keep) - 1), min_size=1, max_size=10))))
    joined = join_steps(keep, anchors)
    assert joined.tolist() == [*(keep[a:b].all() for a, b in pairwise(anchors)), False]


def test_each_filter_drops_its_own_steps_only():
    gui = np.array([False, True, False, False])
    table_ = steps_table(4, gui=gui, idle=[0.5, 0.0, 1.0, np.nan], luma_std=[30.0, 30.0, 30.0, 2.0])
    assert keep_steps(table_, NO_FILTER).tolist() == [True] * 4
    assert keep_steps(table_, filters(drop_gui=True)).tolist() == [True, False, True, True]
    assert keep_steps(table_, filters(drop_null=True)).tolist() == [True, True, False, True]
    assert keep_steps(table_, filters(drop_loading=True)).tolist() == [True, True, True, False]


def test_idle_ticks_go_by_the_commanded_joint_velocities_and_the_end_is_cut_as_asked():
    commands = np.random.default_rng(0).standard_normal(60)
    commands[20:40] = commands[20]
    controls = dict.fromkeys(JOINT_VELOCITY_CONTROLS, commands)
    assert np.flatnonzero(~keep_ticks(controls, filters(drop_idle=True))).tolist() == list(range(21, 40))
    cut = keep_ticks(controls, filters(drop_idle=True, idle_cut_end=10))
    assert np.flatnonzero(cut).tolist() == [*range(11), *range(40, 50)]


def test_an_episode_begins_when_somebody_acts_whatever_its_first_tick_holds():
    for idle in ([0, 1, 1, 0, 1], [1, 1, 1, 0, 0]):
        kept = keep_ticks({"idle": np.array(idle, np.float32)}, filters(drop_loading=True))
        assert kept.tolist() == [False, False, False, True, True]
    assert [find_first_act(np.array(idle)) for idle in ([0, 0], [0, 1, 1], [0], [])] == [1, 3, 1, 0]


def test_skipped_actions_and_failures_are_dropped_when_asked():
    controls = {"skip_action": np.array([False, True, False]), "success": np.zeros(3, bool)}
    assert keep_ticks(controls, filters(drop_skipped_actions=True)).tolist() == [True, False, True]
    assert not keep_ticks(controls, filters(only_success=True)).any()
    assert keep_ticks(controls, NO_FILTER).all()


@pytest.mark.parametrize("name", ["drop_idle", "only_success", "drop_loading", "drop_skipped_actions"])
def test_a_filter_on_what_a_recording_does_not_hold_is_refused(name):
    assert needs_controls(filters(**{name: True}))
    with pytest.raises(
        ValueError, match=rf"filter\.{name}: this recording does not record .*\(others of its source may\)"
    ):
        keep_ticks({"tick": np.arange(3)}, filters(**{name: True}))


def test_null_steps_of_a_recording_that_never_says_who_acts_are_refused_and_it_is_named(based, monkeypatch):
    keep_steps(steps_table(3, idle=[np.nan] * 3, segment=np.arange(3)), filters(drop_null=True))
    steps, first = steps_table(99, idle=[np.nan] * 99), based.segments_of("train", SPLIT)[0].episode
    monkeypatch.setattr(based, "steps", lambda store: steps)
    with pytest.raises(ValueError, match=rf"^episode '{first}': filter\.drop_null: .* record when somebody acts"):
        based.segments_of("train", SPLIT, filters(drop_null=True))


def write_ranges(path, ranges):
    path.write_text(json.dumps(ranges))
    return filters(keep_ranges=path.name)


@pytest.fixture
def based(encoded, tmp_path):
    """The encoded recordings, with files of filters in tmp_path; e0 and e1 are of the training split."""
    dataset = CachedDataset(encoded.manifest, encoded.root, base=tmp_path)
    yield dataset
    dataset.close()


def ticks_of(dataset, segment):
    return read_table(dataset._token_paths[segment.store], layout.STEPS_FILE)["tick"].to_numpy()[
        segment.start : segment.stop
    ]


def test_a_list_of_ranges_keeps_the_ticks_it_lists_and_names_the_episodes_it_does_not_know(based, tmp_path, capsys):
    known, *others = sorted({segment.episode for segment in based.segments_of("train", SPLIT)})
    asked = write_ranges(tmp_path / "r.json", {known: [[2, 18], [19, 37]], "elsewhere": [[0, 9]]})
    segments = based.segments_of("train", SPLIT, asked)
    # The gap of one tick lies between two steps and still parts them.
    assert [ticks_of(based, segment).tolist() for segment in segments] == [[4, 8, 12, 16], [20, 24, 28, 32, 36]]
    assert {segment.episode for segment in segments} == {known}
    said = f"{len(others)} of {len(others) + 1} train episodes are not in r.json and are skipped (first: {others[0]})"
    assert said in capsys.readouterr().err


def test_ranges_that_do_not_fit_are_said_or_refused_and_segments_are_cut_once(based, tmp_path, capsys):
    keys = {segment.episode for segment in based.segments}
    fitting = write_ranges(tmp_path / "r.json", {key: [[0, 30]] for key in keys})
    first = based.segments_of("train", SPLIT, fitting)
    (tmp_path / "r.json").unlink()
    first.append("mine")  # what is done to the list stays there
    assert based.segments_of("train", SPLIT, fitting) == first[:-1]
    assert capsys.readouterr().err == ""
    based.segments_of("train", SPLIT, write_ranges(tmp_path / "s.json", {key: [[0, 900]] for key in keys}))
    assert "have fewer ticks than the list keeps" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"lists 1 episodes and none of this data set, whose first is 'e\d'"):
        based.segments_of("train", SPLIT, write_ranges(tmp_path / "t.json", {"other": [[0, 9]]}))
    with pytest.raises(ValueError, match=r"keep_ranges='none\.json' names no file"):
        based.segments_of("train", SPLIT, filters(keep_ranges="none.json"))
    with pytest.raises(ValueError, match=r"no step of the \d episodes of the split 'train' is left by min_steps=5000"):
        based.segments_of("train", SPLIT, filters(min_steps=5000))


def test_a_list_of_ranges_may_lie_anywhere_and_say_its_content_and_under_dvc_it_must(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    path.write_text("{}")
    digest = hashlib.sha256(b"{}").hexdigest()
    assert ranges_path(NO_FILTER, tmp_path) is None
    assert ranges_path(filters(keep_ranges=str(path)), tmp_path / "base") == path
    assert ranges_path(filters(keep_ranges=f"r.json@{digest[:8]}"), tmp_path) == path
    monkeypatch.setenv("DVC_STAGE", "train")
    assert ranges_path(filters(keep_ranges=f"r.json@{digest}"), tmp_path) == path
    with pytest.raises(ValueError, match=rf"DVC would overlook an edit of .* r\.json@{digest[:12]}, which"):
        ranges_path(filters(keep_ranges="r.json"), tmp_path)
    path.write_text('{"a": []}')
    with pytest.raises(ValueError, match=r"was edited; put it back, or set filter\.keep_ranges to r\.json@"):
        ranges_path(filters(keep_ranges=f"r.json@{digest[:8]}"), tmp_path)


def test_windows_begin_where_somebody_acts_and_the_other_steps_stay(based):
    whole = based.segments_of("train", SPLIT)
    assert based.segments_of("train", SPLIT, filters(drop_gui=True, drop_null=True)) == whole
    (part,) = based.manifest.parts
    first = {
        episode: find_first_act(controls["idle"])
        for entry in part.entries
        for episode, controls in iter_controls(based._root.controls(part.source_fingerprint, entry.unit_digest))
    }
    expected = [segment._replace(start=segment.start - -first[segment.episode] // STRIDE) for segment in whole]
    assert based.segments_of("train", SPLIT, filters(drop_loading=True)) == expected != whole
    longest = max(segment.stop - segment.start for segment in expected)
    (kept,) = based.segments_of("train", SPLIT, filters(drop_loading=True, min_steps=longest))
    assert kept.stop - kept.start == longest


def test_every_filter_is_explained_and_can_be_swept():
    page = (REPOSITORY_ROOT / "docs/filters.md").read_text()
    section = (SUITE_SETTINGS / "params.yaml").read_text().partition("\nfilter:")[2].partition("\nscaler:")[0]
    for field in dataclasses.fields(FilterConfig):
        assert f"| `{field.name}` |" in page and f"\n  {field.name}: " in section, field.name
    assert load_config(SUITE_SETTINGS).filter == NO_FILTER
