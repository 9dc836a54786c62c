"""Claims: a V-JEPA 2.1 file of the released structure goes through stage one and every command by naming preset and file.

What is stored is the image path's output, averaged over 2 x 2 patches and cast once; the manifest, plan and predictor have the
pooled grid. Other settings are another recipe: tests/encoding/test_recipes.py.
"""

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d

from jepa_cache.config.loading import load_config
from jepa_cache.config.schema import EncoderPreset
from jepa_cache.data.dataset import open_dataset
from jepa_cache.encoder.preprocess import CROP_RULES
from jepa_cache.encoder.vit import VisionTransformer21
from jepa_cache.training.run import predictor_arguments
from tests.encoded import decode_all, read_video
from tests.official_files import draw_state, encoder_shapes, prepare, write_v21_file
from tests.store import plain_reader

SIZES = {"embed_dim": 48, "depth": 12, "num_heads": 2, "mlp_dim": 96, "resolution": 64}


@pytest.fixture
def made(fresh):
    """A checkout with a preset of a tiny V-JEPA 2.1 encoder, its weights file, and one encoded recording."""
    for name in ("a", "c"):
        (fresh.recordings / f"{name}.tar").unlink()
    lines = (fresh.folder / "configs/encoder/vitl384_v21.yaml").read_text().splitlines()
    changed = {f"{key}:": f"{key}: {value}" for key, value in {**SIZES, "compute_dtype": "float32"}.items()}
    lines = [next((new for key, new in changed.items() if line.startswith(key)), line) for line in lines]
    (fresh.folder / "configs/encoder/small_v21.yaml").write_text("\n".join(lines))
    preset: EncoderPreset = load_config(fresh.folder, ["encoder=small_v21"]).encoder
    state = draw_state(encoder_shapes(preset))
    write_v21_file(fresh.folder / "v21.pt", state)
    overrides = ("encoder=small_v21", f"encode.weights={fresh.folder / 'v21.pt'}", "encode.single_frame=image")
    return fresh, state, (*overrides, "encode.pool=2")


def test_a_released_file_is_encoded_pooled_checked_and_offered_to_the_predictor(made):
    checkout, state, overrides = made
    planned = checkout.run("estimate", "--json", checkout.recordings, *overrides).document
    # Coded dtypes wait in float16 until a unit's statistics are complete: so many bytes more of the same tokens.
    coded = checkout.run("estimate", "--json", checkout.recordings, *overrides, "encode.dtype=int8").document
    spare = coded["disk"]["needed_bytes"] - coded["bytes"]["int8"]["total"]
    assert spare == coded["all"]["steps"] * 4 * 48 * 2
    checkout.encode(*overrides)
    manifest = checkout.manifest
    assert (manifest.grid, manifest.num_tokens, manifest.width) == ((2, 2), 4, 48)
    assert planned["all"]["steps"] == manifest.num_steps
    tokens = plain_reader.read_tokens(checkout.tokens())
    # Half of the bytes of so small a store are tables.
    assert planned["bytes"]["float16"]["tokens"] == pytest.approx(_bytes_below(checkout.tokens()), rel=0.05)

    frames = decode_all(read_video(checkout.recordings, "z"))[::4][: manifest.num_steps]
    encoder = VisionTransformer21(embed_dim=48, depth=12, num_heads=2, mlp_dim=96)
    encoder.load_state_dict(state)
    with torch.no_grad():
        whole = encoder(prepare(CROP_RULES["ac"], frames, 64)[:, :, None])
    expected = avg_pool2d(whole.transpose(1, 2).unflatten(-1, (4, 4)), 2).flatten(2).transpose(1, 2).half().numpy()
    # Another batch size orders float32 sums differently, which may move a value to the next number of float16.
    np.testing.assert_allclose(tokens.astype(np.float32), expected.astype(np.float32), atol=4e-3)

    online = checkout.run("verify", "--against-online", "4", "--json", checkout.recordings, *overrides)
    assert online.code == 0 and online.document["against_online"]["bit_equal"]
    assert checkout.run("status", "--json", checkout.recordings, *overrides).document["ready"]
    config = load_config(checkout.folder, overrides)
    assert predictor_arguments(config, open_dataset(config, checkout.folder))["grid"] == [2, 2]


def _bytes_below(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
