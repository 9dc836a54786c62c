"""Claims: torch gives the documented formula's numbers bit for bit, per window with its own store's channels; other memory is left alone."""

import numpy as np
import pytest
import torch

from jepa_cache.data.dequantise import TokenScales, dequantise
from jepa_cache.data.loader import Batch, to_device
from jepa_cache.store.quantisation import CODECS, decode, encode, from_float8, measure_channels, to_float8

CODED = [name for name, scheme in CODECS.items() if scheme.max_code is not None]
B, T, N, D = 3, 4, 5, 128


def coded_windows(name):
    """B windows, each of a store of its own: the batch's tensors, and the values [B, T, N, D] by numpy."""
    rng, codes, scales, channels = np.random.default_rng(0), [], [], []
    for store in range(B):
        steps = (rng.standard_normal((T, N, D)) * (store + 1) + rng.uniform(-9, 9, D)).astype(np.float16)
        channels.append(measure_channels([steps], D))
        both = [encode(step, name, channels[-1]) for step in steps]
        codes.append(np.stack([code for code, _ in both]))
        scales.append(np.stack([scale for _, scale in both]))
    values = np.stack([decode(*given) for given in zip(codes, [name] * B, scales, channels, strict=True)])
    tokens = torch.from_numpy(np.stack(codes)).view(getattr(torch, CODECS[name].torch_dtype))
    parts = (scales, [c.scales for c in channels], [c.means for c in channels])
    return tokens, TokenScales(*(torch.from_numpy(np.stack(part)) for part in parts), CODECS[name]), values


def test_every_dtype_is_known_to_torch():
    for codec in CODECS.values():
        assert getattr(torch, codec.torch_dtype).itemsize == np.dtype(codec.dtype).itemsize


@pytest.mark.parametrize("name", CODED)
def test_torch_and_numpy_agree_bit_for_bit(name):
    tokens, scales, values = coded_windows(name)
    before = tokens.clone()
    got = dequantise(tokens, scales)
    assert got.dtype == torch.float32 and np.array_equal(got.numpy(), values)
    assert torch.equal(tokens.view(torch.uint8), before.view(torch.uint8))


def test_float8_is_the_float8_of_torch():
    bits = np.arange(256, dtype=np.uint8)
    theirs = torch.from_numpy(bits).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(from_float8(bits), theirs, equal_nan=True)
    values = np.random.default_rng(1).uniform(-448, 448, 5000).astype(np.float32)
    values[::3] *= np.float32(1e-4)
    assert np.array_equal(to_float8(values), torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_stay_the_same_memory_on_the_same_device(dtype):
    tokens = torch.zeros(B, T, N, D, dtype=dtype)
    batch = Batch(tokens, torch.zeros(B, T - 1, 2), torch.zeros(B, T, 2), np.arange(B))
    moved = to_device(batch, torch.device("cpu"))
    assert moved.tokens.dtype == dtype and moved.tokens.data_ptr() == tokens.data_ptr()


def test_a_batch_on_a_device_holds_values_and_no_scales():
    tokens, scales, values = coded_windows("int8")
    batch = Batch(tokens, torch.zeros(B, T - 1, 2), torch.zeros(B, T, 2), np.arange(B), scales)
    moved = to_device(batch, torch.device("cpu"))
    assert moved.scales is None and np.array_equal(moved.tokens.numpy(), values)
    assert batch.tokens.dtype == torch.int8
