"""Claims: what is stored is the encoder's output, cast once and coded as documented, and both stages run on it.

Another dtype is another recipe, the manifest says what it cost, and a batch holds the documented values.
"""

import numpy as np
import pytest
import torch

from jepa_cache.data.loader import WindowLoader, to_device
from jepa_cache.data.windows import WindowIndex
from jepa_cache.encoder.frozen import FrozenEncoder
from jepa_cache.store.quantisation import CODECS, Codec, decode
from jepa_cache.store.root import CacheRoot
from tests.caches import make_cache, make_config
from tests.encoded import encode, make_tars, tiny_config
from tests.store import plain_reader


def test_what_is_stored_is_the_encoders_output_cast_once_and_the_manifest_says_what_that_cost(tmp_path, monkeypatch):
    outputs, real = [], FrozenEncoder.encode
    monkeypatch.setattr(FrozenEncoder, "encode", lambda self, it: outputs.append(real(self, it)) or outputs[-1])
    recordings = make_tars(tmp_path / "in", {"a": {"e0": 60, "e1": 45}})
    manifest = encode(recordings, tmp_path / "cache", tiny_config(dtype="bfloat16")).manifest
    (entry,), computed = manifest.entries, torch.cat(outputs).flatten(0, 1)
    store = CacheRoot(tmp_path / "cache").tokens(manifest.fingerprint, entry.unit_digest)
    stored = plain_reader.read_array(store / "tokens")
    assert np.array_equal(stored, computed.bfloat16().view(torch.uint16).numpy())
    assert (stored != computed.half().bfloat16().view(torch.uint16).numpy()).any(), "by float16 it would be cast twice"
    truth = computed.double().numpy()
    error = plain_reader.read_tokens(store) - truth
    rmse = np.sqrt((error**2).sum() / (truth**2).sum())
    assert entry.reconstruction_rmse == pytest.approx(rmse, rel=0.005) and 0 < rmse < 3e-3  # three digits
    assert entry.reconstruction_max_abs == pytest.approx(np.abs(error).max(), rel=0.005)


@pytest.mark.parametrize("dtype", CODECS)
def test_a_batch_holds_the_documented_values_of_its_windows(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("tests.caches.WIDTH", 64)  # what int4 needs
    cache = make_cache(tmp_path, dtype=dtype)
    dataset, stores = cache.dataset, set()
    folders = [cache.root.tokens(part.fingerprint, entry.unit_digest) for part, entry in dataset.manifest.stores]
    index, values = WindowIndex(dataset.segments, 5), [plain_reader.read_tokens(store) for store in folders]
    numbers = np.random.default_rng(0).integers(0, len(index), (6, 4)).tolist()
    loader = WindowLoader(dataset, index, cache.scaler, num_threads=2)
    for batch, chosen in zip(loader.iterate(numbers), numbers, strict=True):
        windows = [index[number] for number in chosen]
        stores |= {window.store for window in windows}
        expected = np.stack([values[window.store][window.start : window.start + 5] for window in windows])
        got = to_device(batch, torch.device("cpu")).tokens
        assert got.is_floating_point() and np.array_equal(got.float().numpy(), expected)
    assert len(stores) == 2  # whose channels differ
    dataset.close()


def test_a_new_dtype_is_one_entry_that_is_written_read_and_decoded_anywhere(tmp_path, monkeypatch):
    """Codes of -1 and 1 in the sign of an int16, as nobody would store them."""
    signs = Codec(
        dtype="int16",
        torch_dtype="int16",
        cast="float16",
        fill_value=0,
        unpack=lambda stored: stored.astype(np.float32),
        unpack_tensor=lambda stored: stored.float(),
        meaning="code = the stored integer",
        pack=lambda codes: np.where(codes < 0, -1, 1).astype(np.int16),
        max_code=1.0,
    )
    monkeypatch.setitem(CODECS, "signs", signs)
    monkeypatch.setattr(  # the schema's list of names is the other place
        "tests.caches.make_config", lambda *given: make_config(*(it for it in given if it != "encode.dtype=signs"))
    )
    cache = make_cache(tmp_path, dtype="signs")
    dataset, index = cache.dataset, WindowIndex(cache.dataset.segments, 5)
    batch = to_device(WindowLoader(dataset, index, cache.scaler).read([0]), torch.device("cpu"))
    codes = np.empty((5, *batch.tokens.shape[2:]), np.int16)
    scales = np.empty(codes.shape[:2], np.float32)
    dataset.read_tokens(0, 0, codes)
    dataset.read_token_scales(0, 0, scales)
    assert set(codes.ravel()) == {-1, 1}
    assert np.array_equal(batch.tokens[0].numpy(), decode(codes, "signs", scales, dataset.channels(0)))
