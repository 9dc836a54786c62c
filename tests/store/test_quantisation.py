"""Claims: a code is the nearest one, statistics are those of all steps and depend on nothing else, and no code is ever the fill value."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jepa_cache.config.schema import STORED_DTYPES
from jepa_cache.store.quantisation import (
    CODECS,
    Channels,
    decode,
    encode,
    from_float8,
    is_finite,
    measure_channels,
    scales_dtype,
    step_bytes,
    to_float8,
)

CODED = [name for name, scheme in CODECS.items() if scheme.max_code is not None]
D = 64
STEPS = hnp.arrays(np.float16, (3, 2, D), elements=st.floats(-65504, 65504, width=16))


def encode_all(steps, name, channels):
    codes, scales = zip(*(encode(step, name, channels) for step in steps), strict=True)
    return np.stack(codes), np.stack(scales)


def test_every_dtype_of_the_settings_has_a_scheme():
    assert tuple(CODECS) == STORED_DTYPES


def check_errors(steps, name):
    """No value is further from the truth than half a step of its code, apart from float32's own rounding."""
    channels = measure_channels([steps], D)
    codes, scales = encode_all(steps, name, channels)
    values = decode(codes, name, scales, channels).astype(np.float64)
    truth = steps.astype(np.float64)
    assert not (codes == CODECS[name].fill_value).any() and np.isfinite(values).all()
    if name == "int4":
        assert (codes & 15).min() >= 1 and (codes >> 4).min() >= 1
    wide = scales.astype(np.float64).reshape(*steps.shape[:2], -1)  # D is one group of int4
    unit = wide * channels.scales.astype(np.float64)
    normalised = np.abs(truth - channels.means) / np.where(unit == 0, 1, unit)
    # A float8 has 4 significant bits above 2^-6, and steps of 2^-9 below.
    step = np.maximum(2.0 ** (np.floor(np.log2(np.maximum(normalised, 2**-6))) - 3), 2**-9) if "float8" in name else 1.0
    # A scale below the smallest normal number is stored as 0: then the value is lost, and it is below max_code * tiny.
    lost = (unit == 0) * CODECS[name].max_code * float(np.finfo(scales.dtype).tiny) * channels.scales
    rounding = 1e-6 * (np.abs(truth) + np.abs(channels.means) + channels.scales)
    if name == "int4":
        rounding = rounding + unit * 7 * 2.0**-11  # of the float16 scale
    assert (np.abs(values - truth) <= 0.5 * step * unit + lost + rounding).all()


@pytest.mark.parametrize("name", CODED)
@settings(max_examples=25, deadline=None)
@given(steps=STEPS)
def test_a_value_comes_back_within_half_a_step_of_its_code_and_no_code_is_the_fill_value(name, steps):
    check_errors(steps, name)


@pytest.mark.parametrize("name", CODED)
def test_tokens_too_small_for_a_scale_of_full_precision_come_back_as_the_mean(name):
    half = np.random.default_rng(5).standard_normal((10, 20, D))
    half[0] *= np.logspace(-7, -2, 20)[:, None]
    steps = np.concatenate([half, -half]).astype(np.float16)  # every mean is exactly 0
    check_errors(steps, name)


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 30), max_size=4))
def test_the_statistics_do_not_depend_on_how_the_steps_come(cuts):
    steps = (np.random.default_rng(0).standard_normal((30, 3, 7)) * 3 + 5).astype(np.float16)
    whole, parts = measure_channels([steps], 7), measure_channels(np.split(steps, sorted(cuts)), 7)
    assert all(np.array_equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_the_statistics_are_mean_and_deviation_of_all_tokens_also_far_from_zero():
    rng = np.random.default_rng(1)
    steps = (rng.standard_normal((200, 4, 6)) * [1, 0.01, 30, 40, 2, 1] + [0, 60, -900, 1e4, 0, 3]).astype(np.float16)
    channels = measure_channels([steps], 6)
    tokens = steps.reshape(-1, 6).astype(np.float64)
    np.testing.assert_allclose(channels.scales, tokens.std(axis=0), rtol=1e-4)  # sums in float32 within a step
    np.testing.assert_allclose(channels.means, tokens.mean(axis=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CODED)
def test_channels_and_tokens_that_never_change_come_back_exactly(name):
    steps = np.tile(np.linspace(-60, 60, D, dtype=np.float16), (3, 2, 1))
    channels = measure_channels([steps], D)
    assert (channels.scales == 1).all()
    codes, scales = encode_all(steps, name, channels)
    assert (scales == 0).all()
    assert np.array_equal(decode(codes, name, scales, channels), steps.astype(np.float32))


def test_a_float8_is_the_nearest_with_ties_to_the_even_one():
    table = from_float8(np.arange(127, dtype=np.uint8))
    middles = (table[1:] + table[:-1]) / 2
    rng = np.random.default_rng(3)
    beside = [np.nextafter(middles, 0), np.nextafter(middles, 500, dtype=np.float32)]
    drawn = [rng.uniform(0, 448, 3000), rng.uniform(0, 0.05, 3000)]
    values = np.concatenate([table, middles, *beside, *drawn]).astype(np.float32)
    upper = np.clip(np.searchsorted(table, values), 1, 126)
    below, above = values.astype(np.float64) - table[upper - 1], table[upper] - values.astype(np.float64)
    nearest = np.where((above < below) | ((above == below) & (upper % 2 == 0)), upper, upper - 1)
    assert np.array_equal(to_float8(values), nearest)
    assert np.array_equal(to_float8(-values), nearest | 0x80)


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0x7F81])
def test_the_bits_of_infinities_and_nans_are_not_finite(bits):
    tokens = np.full((1, 2, 3), 0x4000, np.uint16)
    assert is_finite(tokens)
    tokens[0, 1, 2] = bits
    assert not is_finite(tokens)


@pytest.mark.parametrize("name", CODECS)
def test_the_bytes_of_a_step_are_those_of_its_codes_and_scales(name):
    step = np.random.default_rng(4).standard_normal((3, 2 * D)).astype(np.float16)
    if name not in CODED:
        assert step_bytes(name, 3, 2 * D) == step.nbytes
        return
    codes, scales = encode(step, name, Channels(np.ones(2 * D, np.float32), np.zeros(2 * D, np.float32)))
    assert (codes.dtype, scales.dtype) == (CODECS[name].dtype, scales_dtype(name))
    assert step_bytes(name, 3, 2 * D) == codes.nbytes + scales.nbytes
