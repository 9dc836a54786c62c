"""Claims: what names an encoder's tokens is the hash of the weights that computed them.

Weights that are swapped between hashing and loading, while they are loaded, or behind a digest table that is misled, are an error before
anything is stored, and the same command then encodes with those that are there. What becomes of the file after loading changes nothing.
"""

import dataclasses
import os
import shutil
import sqlite3

import pytest
import torch
from safetensors.torch import save_file

from jepa_cache.encoder import frozen
from jepa_cache.encoder.frozen import load_module
from jepa_cache.encoding import run
from jepa_cache.encoding.run import encode_dataset
from jepa_cache.store.root import CacheRoot
from tests.encoded import all_files, make_tiny_tar, tiniest_config, tiny_config
from tests.encoder.image_models import preset_of, save_model
from tests.makers import make_vpt_pair, write_vpt_tar


def save_weights(path, kind, seed):
    """Weights of that seed; the settings under which they are used."""
    if kind == "hf":
        save_model(path, seed=seed)
        return dataclasses.replace(tiny_config(weights=str(path)), encoder=preset_of(path))
    preset = dataclasses.replace(tiniest_config().encoder, random_seed=seed)
    state = load_module(preset, None).state_dict()
    (save_file if kind == "safetensors" else torch.save)(state, path)
    preset = dataclasses.replace(preset, random_seed=None, weights=str(path))
    return dataclasses.replace(tiniest_config(weights=str(path)), encoder=preset)


class Place:
    """Weights in use, and others that may take their place."""

    def __init__(self, folder, kind):
        suffix = {"hf": "", "safetensors": ".safetensors", "pt": ".pt"}[kind]
        self.weights, self.others = folder / f"weights{suffix}", folder / f"others{suffix}"
        self.config = save_weights(self.weights, kind, 1)
        save_weights(self.others, kind, 2)
        self.root, self.recordings = CacheRoot(folder / "cache"), folder / "in"
        if kind == "hf":
            write_vpt_tar(self.recordings / "a.tar", {"a": make_vpt_pair(9, size=(96, 96))})
        else:
            make_tiny_tar(self.recordings, "a")

    def swap(self):
        aside = self.weights.with_name("aside")
        for source, target in ((self.weights, aside), (self.others, self.weights), (aside, self.others)):
            source.rename(target)

    def encode(self):
        return encode_dataset(self.config, [str(self.recordings)], base=self.recordings, root=self.root).manifest

    def stores(self):
        return [name for name in all_files(self.root.path) if name.startswith("tokens/")]


@pytest.fixture
def place(tmp_path, monkeypatch, request):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return Place(tmp_path, request.param)


@pytest.mark.parametrize("while_loading", [False, True])
@pytest.mark.parametrize("place", ["pt", "safetensors", "hf"], indirect=True)
def test_weights_swapped_after_hashing_are_an_error_and_then_used_under_their_own_name(
    place, monkeypatch, while_loading
):
    def load(*given):
        place.swap()
        module = load_module(*given)
        place.swap()
        return module

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="not those that the stores are named by"):
        if while_loading:  # and back again
            patch.setattr(frozen, "load_module", load)
        else:
            patch.setattr(run, "check_controls", lambda _: place.swap())  # after they were hashed, before loading
        place.encode()
    assert place.stores() == []
    first = place.encode()
    place.swap()
    assert place.encode().fingerprint != first.fingerprint


@pytest.mark.parametrize("place", ["pt"], indirect=True)
def test_a_digest_table_that_is_misled_is_found_out_and_put_right(place):
    """As on a file system that knows neither inodes nor change times."""
    honest = place.encode()
    shutil.rmtree(place.root.path)
    with sqlite3.connect(os.environ["XDG_STATE_HOME"] + "/jepa-cache/digests.sqlite") as table:
        table.execute("UPDATE files SET digest = ? WHERE path = ?", ("0" * 64, str(place.weights)))
    with pytest.raises(ValueError, match="not those that the stores are named by"):
        place.encode()
    assert place.stores() == []
    assert place.encode() == honest


@pytest.mark.parametrize("place", ["pt", "safetensors", "hf"], indirect=True)
def test_what_is_loaded_stays_what_it_was_whatever_becomes_of_the_file(place):
    module = load_module(place.config.encoder, place.weights)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for path in [place.weights] if place.weights.is_file() else place.weights.glob("*.safetensors"):
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
