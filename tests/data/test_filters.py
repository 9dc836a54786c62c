"""Claims: filters cut segments by the step table and the controls; what is cut is never in a window, all else stays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jepa_cache.config.schema import FilterConfig
from jepa_cache.data.filters import NO_FILTER, cut_runs, keep_steps, keep_ticks
from jepa_cache.data.windows import WindowIndex
from jepa_cache.idle import JOINT_VELOCITY_CONTROLS
from jepa_cache.store import layout
from jepa_cache.store.writer import table


def steps_table(num_steps, **columns):
    base = {field.name: np.zeros(num_steps) for field in layout.STEPS_SCHEMA} | {"gui": np.zeros(num_steps, bool)}
    for name in ("segment", "frame", "tick"):
        base[name] = np.arange(num_steps)
    return table(layout.STEPS_SCHEMA, base | columns)


def filters(**changes):
    return FilterConfig(**(vars(NO_FILTER) | changes))


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 5), st.data())
def test_the_runs_are_exactly_the_kept_steps_in_pieces_of_enough_length(keep, min_steps, data):
    keep = np.array(keep)
    start = data.draw(st.integers(0, len(keep)))
    stop = data.draw(st.integers(start, len(keep)))
    runs = cut_runs(start, stop, keep, min_steps)
    covered = {step for a, b in runs for step in range(a, b)}
    assert all(keep[step] and start <= step < stop for step in covered)
    assert all(b - a >= min_steps for a, b in runs)
    for a, b in runs:  # as long as can be
        assert (a == start or not keep[a - 1]) and (b == stop or not keep[b])
    if min_steps == 1:
        assert covered == {step for step in range(start, stop) if keep[step]}


def test_each_filter_drops_its_own_steps_only():
    gui = np.array([False, True, False, False])
    table_ = steps_table(4, gui=gui, idle=[0.5, 0.0, 1.0, np.nan], luma_std=[30.0, 30.0, 30.0, 2.0])
    assert keep_steps(table_, NO_FILTER).tolist() == [True] * 4
    assert keep_steps(table_, filters(drop_gui=True)).tolist() == [True, False, True, True]
    assert keep_steps(table_, filters(drop_null=True)).tolist() == [True, True, False, True]
    assert keep_steps(table_, filters(min_luma_std=5.0)).tolist() == [True, True, True, False]


def test_idle_ticks_go_by_the_commanded_joint_velocities():
    commands = np.random.default_rng(0).standard_normal(60)
    commands[20:40] = commands[20]
    controls = dict.fromkeys(JOINT_VELOCITY_CONTROLS, commands)
    kept = keep_ticks(controls, filters(drop_idle=True))
    assert kept[:20].all() and not kept[21:40].any() and kept[40:].all()


def test_a_filter_on_what_the_source_does_not_record_is_refused():
    for change in ("drop_idle", "only_success"):
        with pytest.raises(ValueError, match=f"filter.{change}"):
            keep_ticks({"tick": np.arange(3)}, filters(**{change: True}))


def test_windows_of_a_cached_data_set_hold_no_step_that_was_cut(tmp_path):
    from tests.caches import make_cache

    cache = make_cache(tmp_path)
    whole = cache.dataset.segments_of("train", cache.config.split)
    long = cache.dataset.segments_of("train", cache.config.split, filters(min_steps=31))
    assert whole and not long
    same = cache.dataset.segments_of("train", cache.config.split, filters(drop_gui=True))
    assert same == whole
    assert len(WindowIndex(same, 5)) == len(WindowIndex(whole, 5))
