"""Claims: what is stored is the encoder's output, cast once and coded as documented, and both stages run on it.

Another dtype is another recipe, the manifest says what it cost, and a batch holds the documented values.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from jepa_cache.config.schema import Config
from jepa_cache.data.dataset import CachedDataset
from jepa_cache.data.loader import WindowLoader, to_device
from jepa_cache.data.scaler import Scaler, fit_scaler
from jepa_cache.data.windows import WindowIndex
from jepa_cache.encoder.frozen import FrozenEncoder
from jepa_cache.store.manifest import Manifest
from jepa_cache.store.quantisation import CODECS, Codec, decode, encode, measure_channels
from jepa_cache.store.root import CacheRoot
from tests.caches import make_cache, make_config
from tests.encoded import encode as encode_recordings
from tests.encoded import make_tars, tiny_config
from tests.store import plain_reader

EPISODES = {"a": {"e0": 60, "e1": 45, "e2": 40, "e3": 45}, "b": {"e4": 52, "e5": 40}}
CODED = [name for name, scheme in CODECS.items() if scheme.max_code is not None]


class Made(NamedTuple):
    """A data set of one dtype, and what the encoder gave while it was made: [n, N, D] float32 per store, in order."""

    config: Config
    manifest: Manifest
    root: CacheRoot
    computed: list[torch.Tensor]

    @property
    def stores(self):
        return [self.root.tokens(part.fingerprint, entry.unit_digest) for part, entry in self.manifest.stores]

    def open(self) -> tuple[CachedDataset, Scaler]:
        dataset = CachedDataset(self.manifest, self.root)
        segments = dataset.segments_of("train", self.config.split)
        return dataset, fit_scaler(dataset, segments, self.config.scaler)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return make_tars(tmp_path_factory.mktemp("recordings"), EPISODES)


def make(recordings, folder, dtype) -> Made:
    outputs, real = [], FrozenEncoder.encode

    def recorded(self, groups):
        outputs.append(real(self, groups))
        return outputs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrozenEncoder, "encode", recorded)
        manifest = encode_recordings(recordings, folder / "cache", tiny_config(dtype=dtype)).manifest
    root = CacheRoot(folder / "cache")
    small = ("split.val_share=0.4", "split.seed=1", "evaluate.windows_per_episode=2", "evaluate.num_bootstrap=100")
    config = make_config("dataset=vpt", "encoder=tiny", f"encode.dtype={dtype}", *small)
    return Made(config, manifest, root, in_order_of(manifest, root, torch.cat(outputs).flatten(0, 1)))


def in_order_of(manifest, root, computed):
    """The encoder's output by store: units are encoded in an order of their own, so that of the nearest values is taken."""
    stores = [root.tokens(part.fingerprint, entry.unit_digest) for part, entry in manifest.stores]
    values = [torch.from_numpy(plain_reader.read_tokens(store)) for store in stores]
    first, second = ([len(part) for part in order] for order in (values, values[::-1]))
    orders = [list(computed.split(first)), list(computed.split(second))[::-1]]
    return min(orders, key=lambda order: max(float((a - b).abs().max()) for a, b in zip(order, values, strict=True)))


# A cast that float16 tokens would not give, and codes with all that codes may have: groups, packing, a decoder of their own.
@pytest.fixture(scope="module", params=["bfloat16", "int4"])
def made(request, recordings, tmp_path_factory) -> Made:
    return make(recordings, tmp_path_factory.mktemp(request.param), request.param)


def test_what_is_stored_is_the_encoders_output_cast_once_and_coded(made):
    dtype = made.config.encode.dtype
    for store, computed in zip(made.stores, made.computed, strict=True):
        stored = plain_reader.read_array(store / "tokens")
        if dtype == "bfloat16":  # from float16 the rounding would be twice
            assert np.array_equal(stored, computed.bfloat16().view(torch.uint16).numpy())
            assert (stored != computed.half().bfloat16().view(torch.uint16).numpy()).any()
            continue
        tokens = computed.half().numpy()
        channels = measure_channels([tokens], tokens.shape[2])
        assert np.array_equal(stored, np.stack([encode(step, dtype, channels)[0] for step in tokens]))


def test_the_manifest_says_what_storing_cost(made):
    dtype = made.config.encode.dtype
    for store, entry, computed in zip(made.stores, made.manifest.entries, made.computed, strict=True):
        truth = (computed.half() if dtype in CODED else computed).double().numpy()
        error = plain_reader.read_tokens(store) - truth
        rmse, largest = np.sqrt((error**2).sum() / (truth**2).sum()), np.abs(error).max()
        assert entry.reconstruction_rmse == pytest.approx(rmse, rel=0.005)  # stated with three digits
        assert entry.reconstruction_max_abs == pytest.approx(largest, rel=0.005)
        assert rmse < {"bfloat16": 3e-3, "int4": 0.1}[dtype]


def test_a_batch_holds_the_documented_values_of_its_windows(made):
    check_batches(*made.open(), made.stores)


@pytest.mark.parametrize("dtype", ["float16", "int8", "float8_e4m3"])
def test_a_batch_of_the_other_dtypes_does_so_too(tmp_path, dtype):
    cache = make_cache(tmp_path, dtype=dtype)
    stores = [cache.root.tokens(part.fingerprint, entry.unit_digest) for part, entry in cache.dataset.manifest.stores]
    check_batches(cache.dataset, cache.scaler, stores)


def check_batches(dataset, scaler, folders):
    index = WindowIndex(dataset.segments, 5)
    values = [plain_reader.read_tokens(store) for store in folders]
    numbers = np.random.default_rng(0).integers(0, len(index), (6, 4)).tolist()
    loader, stores = WindowLoader(dataset, index, scaler, num_threads=2), set()
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
