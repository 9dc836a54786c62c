"""Small presets and states for the encoder's tests."""

from dataclasses import replace

import pytest
import torch

from jepa_cache.config.loading import load_config
from tests.official_files import draw_state, encoder_shapes
from tests.workspace import SUITE_SETTINGS


@pytest.fixture(autouse=True)
def one_thread():
    """One torch thread: two are slower on a shared machine, and sums keep one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def preset():
    """Untrained, 32 px, 2 x 2 tokens a step."""
    tiny = load_config(SUITE_SETTINGS, ["encoder=tiny"]).encoder
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 2, "mlp_dim": 96, "resolution": 32, "batch_size": 4}
    return replace(tiny, name="small", random_seed=3, **sizes)


@pytest.fixture
def file_preset(preset):
    """As `preset`, but its weights come from entry target_encoder of a file."""
    return replace(preset, random_seed=None, weights="encoder.pt", weights_entry="target_encoder")


@pytest.fixture
def wide_state(preset):
    """Official names; drawn wide enough that positions and attention show in the outputs."""
    return draw_state(encoder_shapes(preset))


@pytest.fixture
def preset_21(preset):
    """As `preset`, of V-JEPA 2.1's kind, at the least depth that has four levels; weights from entry ema_encoder of a file."""
    return replace(
        preset,
        name="small_v21",
        kind="vjepa2_1",
        depth=12,
        rope="paired",
        positions="rescaled",
        random_seed=None,
        weights="encoder.pt",
        weights_entry="ema_encoder",
    )


@pytest.fixture
def state_21(preset_21):
    """Its weights."""
    return draw_state(encoder_shapes(preset_21))
