"""Small presets and states for the encoder's tests."""

from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace

import pytest
import torch

from jepa_cache.config.schema import EncoderPreset
from jepa_cache.encoder.structure import parameter_shapes


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
    return EncoderPreset(
        name="small",
        embed_dim=48,
        depth=2,
        num_heads=2,
        mlp_dim=96,
        patch_size=16,
        tubelet_size=2,
        resolution=32,
        rope="tiled",
        crop="ac",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        compute_dtype="float32",
        batch_size=4,
        weights=None,
        weights_entry=None,
        weights_sha256=None,
        random_seed=3,
    )


@pytest.fixture
def file_preset(preset):
    """As `preset`, but its weights come from entry target_encoder of a file."""
    return replace(preset, random_seed=None, weights="encoder.pt", weights_entry="target_encoder")


@pytest.fixture
def wide_state(preset):
    """Official names; drawn wide enough that positions and attention show in the outputs."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in parameter_shapes(preset).items():
        fan_in = torch.Size(shape[1:]).numel()
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            state[name] = noise * 1.6 / fan_in**0.5
        else:
            state[name] = noise * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return state


@pytest.fixture
def http_folder(tmp_path):
    """A folder served on the loopback interface."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield SimpleNamespace(path=folder, url=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
        thread.join()
