"""Claims: codes that a device makes, and the channels' means and deviations, are those of numpy, bit for bit, and so is a store of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jepa_cache.encoding.quantising import quantise, sum_channels
from jepa_cache.store.quantisation import CODECS, decode, encode, measure_channels
from jepa_cache.store.writer import measure_error
from tests.emulated_cuda import emulated_cuda, on_emulated_cuda

CODED = [name for name, codec in CODECS.items() if codec.max_code is not None]
D = 128
VALUES = st.floats(-65504, 65504, width=16) | st.floats(-4, 4, width=16) | st.just(0.0)


def expected_of(steps, dtype, channels):
    codes, scales = (np.stack(it) for it in zip(*(encode(step, dtype, channels) for step in steps), strict=True))
    errors = [
        measure_error(decode(*it, channels), step)
        for *it, step in zip(codes, [dtype] * len(codes), scales, steps, strict=True)
    ]
    return codes, scales, np.stack(errors)


def check(steps, dtype, device):
    channels, of = measure_channels([steps], D), torch.device(device)
    for made, expected in zip(measure_channels([steps], D, lambda *it: sum_channels(*it, of)), channels, strict=True):
        assert made.tobytes() == expected.tobytes()
    codes, scales, errors = quantise(steps, channels, dtype, of)
    for made, expected in zip((codes, scales), expected_of(steps, dtype, channels), strict=False):
        assert made.dtype == expected.dtype and made.tobytes() == expected.tobytes()
    np.testing.assert_allclose(errors, expected_of(steps, dtype, channels)[2], rtol=1e-4)


@pytest.mark.parametrize("dtype", CODED)
@settings(max_examples=60, deadline=None)
@given(steps=hnp.arrays(np.float16, (3, 2, D), elements=VALUES))
def test_any_steps_give_the_codes_of_numpy(dtype, steps):
    check(steps, dtype, "cpu")


@on_emulated_cuda
def test_on_a_gpu_nothing_is_mixed_with_the_cpu():
    steps = np.random.default_rng(0).standard_normal((5, 4, D)).astype(np.float16)
    with emulated_cuda():
        for dtype in CODED:
            check(steps, dtype, "cuda")
