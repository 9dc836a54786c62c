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
from tests.encoded import encode, make_tiny_tar, tiniest_config, tiny_config
from tests.encoder.image_models import preset_of, save_model
from tests.makers import make_vpt_pair, write_vpt_tar

OTHERS = "not those that the stores are named by"


class Place:
    """Weights in use, others that may take their place, and recordings."""

    def __init__(self, folder, kind):
        suffix = {"hf": "", "safetensors": ".safetensors", "pt": ".pt"}[kind]
        self.folder, self.weights, self.others = folder, folder / f"weights{suffix}", folder / f"others{suffix}"
        for seed, path in enumerate((self.others, self.weights)):
            if kind == "hf":
                save_model(path, seed=seed)
                preset = preset_of(path)
            else:
                preset = dataclasses.replace(tiniest_config().encoder, random_seed=seed)
                (save_file if kind == "safetensors" else torch.save)(load_module(preset, None).state_dict(), path)
                preset = dataclasses.replace(preset, random_seed=None, weights=str(path))
        self.config = dataclasses.replace(tiny_config(weights=str(self.weights)), encoder=preset)
        if kind == "hf":
            write_vpt_tar(folder / "in/a.tar", {"a": make_vpt_pair(9, size=(96, 96))})
        else:
            make_tiny_tar(folder / "in", "a")

    def swap(self):
        aside = self.weights.with_name("aside")
        for source, target in ((self.weights, aside), (self.others, self.weights), (aside, self.others)):
            source.rename(target)

    def encode(self):
        return encode(self.folder / "in", self.folder / "cache", self.config).manifest

    def encode_nothing(self):
        with pytest.raises(ValueError, match=OTHERS):
            self.encode()
        assert not list(self.folder.glob("cache/tokens/*/*.zarr"))


@pytest.fixture
def place(tmp_path, request):
    return Place(tmp_path, request.param)


@pytest.mark.parametrize("place", ["pt", "safetensors", "hf"], indirect=True)
def test_weights_swapped_after_hashing_are_an_error_and_then_used_under_their_own_name(place, monkeypatch):
    def load(*given):
        place.swap()
        module = load_module(*given)
        place.swap()  # and back again
        return module

    for owner, name, value in ((frozen, "load_module", load), (run, "check_controls", lambda _: place.swap())):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            place.encode_nothing()
    first = place.encode()
    place.swap()
    assert place.encode().fingerprint != first.fingerprint


@pytest.mark.parametrize("place", ["pt"], indirect=True)
def test_a_digest_table_that_is_misled_is_found_out_and_put_right(place):
    """As on a file system that knows neither inodes nor change times."""
    honest = place.encode()
    shutil.rmtree(place.folder / "cache")
    (table,) = place.folder.rglob("digests.sqlite")
    with sqlite3.connect(table) as connection:
        changed = ("0" * 64, os.fspath(place.weights))
        assert connection.execute("UPDATE files SET digest = ? WHERE path = ?", changed).rowcount == 1
    place.encode_nothing()
    assert place.encode() == honest


@pytest.mark.parametrize("place", ["pt", "safetensors", "hf"], indirect=True)
def test_what_is_loaded_stays_what_it_was_whatever_becomes_of_the_file(place):
    module = load_module(place.config.encoder, place.weights)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for path in [place.weights] if place.weights.is_file() else place.weights.glob("*.safetensors"):
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
