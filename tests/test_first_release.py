"""What the first release (commit 7204ba2) wrote is read, found again and reproduced.

`first_release/first_release.tar.gz` holds what that commit's own code made from two tar shards of four tiny recordings with
a one-block encoder: the shards, a cache root with their stores in all five dtypes, the manifests, every number that was read
from them (expected.npz), and the scaler, two checkpoints and the predictor of a training of eight steps on the float16
stores. `first_release/demo_metrics.json` is what its `make demo` measured. No commit that moves code edits these files.

Claims:
- stage one finds every store of a first-release root again: the same manifest, and the encoder is never opened;
- every number of its stores reads as it did then;
- its checkpoints and predictor load, and the predictor predicts what it predicted;
- a training with the same settings ends with the same weights;
- (long) the demo measures what it measured.
"""

import dataclasses
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from jepa_cache.config.schema import Config
from jepa_cache.data.dataset import CachedDataset
from jepa_cache.data.scaler import fit_scaler, read_scaler
from jepa_cache.encoding import run as encoding_run
from jepa_cache.predictor.checkpoints import load_predictor
from jepa_cache.store.manifest import read_manifest
from jepa_cache.store.root import CacheRoot
from jepa_cache.training.checkpoint import load_checkpoint
from jepa_cache.training.trainer import train
from tests.caches import make_config
from tests.encoded import encode, read_everything, same_numbers, tiny_config
from tests.workspace import Workspace

ARCHIVE = Path(__file__).parent / "first_release/first_release.tar.gz"
DTYPES = ("float16", "bfloat16", "int8", "float8_e4m3", "int4")
ENCODER = {"embed_dim": 64, "depth": 1, "num_heads": 1, "mlp_dim": 16, "resolution": 32}
TRAINING = (
    *("dataset=vpt", "split.val_share=0.5", "split.seed=1", "train.num_steps=8", "train.checkpoint_every=4"),
    *("train.keep_last=2", "train.validate_every=0", "train.num_warmup=2", "train.num_anneal=2"),
)


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("first-release")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def expected(first) -> dict[str, np.ndarray]:
    with np.load(first / "expected.npz") as file:
        return dict(file)


def with_its_encoder(config: Config, **encode: object) -> Config:
    return replace(
        config,
        encoder=dataclasses.replace(config.encoder, **ENCODER),
        encode=dataclasses.replace(tiny_config(**encode).encode),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_its_stores_are_found_again_without_an_encoder(first, dtype, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the encoder was opened although every store is there")

    monkeypatch.setattr(encoding_run, "load_encoder", refuse)
    result = encode(first / "recordings", first / "cache", with_its_encoder(tiny_config(), dtype=dtype))
    assert result.num_encoded == 0
    assert result.manifest.to_bytes() == (first / f"manifest-{dtype}.json").read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_its_stores_reads_as_before(first, expected, dtype):
    numbers = read_everything(CacheRoot(first / "cache"), read_manifest(first / f"manifest-{dtype}.json"))
    names = [name.removeprefix(f"{dtype} ") for name in expected if name.startswith(f"{dtype} ")]
    assert names
    different = [
        name
        for name in names
        if not same_numbers(
            np.asarray(numbers[name]).astype(expected[f"{dtype} {name}"].dtype), expected[f"{dtype} {name}"]
        )
    ]
    assert not different, different


def test_its_checkpoints_load(first):
    for step in (4, 8):
        checkpoint = load_checkpoint(first / f"checkpoints/step-{step:08d}")
        assert checkpoint.step == step
        assert checkpoint.optimizer["state"]


def test_its_predictor_predicts_what_it_predicted(first, expected):
    predictor, _ = load_predictor(first / "run/predictor.safetensors")
    rng = np.random.default_rng(0)
    shapes = ((4, 64), (13,), (2,))  # tokens, actions, states
    inputs = [torch.from_numpy(rng.standard_normal((2, 4, *shape)).astype(np.float32)) for shape in shapes]
    with torch.no_grad():
        output = predictor.eval()(*inputs)[0].numpy()
    # Another processor multiplies matrices in another order.
    np.testing.assert_allclose(output, expected["predictor output"], atol=1e-5)


def test_a_training_with_its_settings_ends_with_its_weights(first, tmp_path, monkeypatch):
    monkeypatch.setenv("JEPA_RUNS_HOME", str(tmp_path / "runs"))
    AcceleratorState._reset_state(reset_partial_state=True)
    config = with_its_encoder(make_config(*TRAINING))
    dataset = CachedDataset(read_manifest(first / "manifest-float16.json"), CacheRoot(first / "cache"))
    scaler = fit_scaler(dataset, dataset.segments_of("train", config.split), config.scaler)
    assert scaler == read_scaler(first / "scaler.json")
    result = train(config, dataset, scaler, tmp_path / "run", base=tmp_path, fresh=False)
    weights, before = load_file(result.weights), load_file(first / "run/predictor.safetensors")
    assert set(weights) == set(before)
    for name, tensor in weights.items():
        torch.testing.assert_close(
            tensor, before[name], atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.long
def test_the_demo_measures_what_the_first_release_measured(tmp_path):
    workspace = Workspace(tmp_path, smaller=False)
    workspace.run("dvc", "repro", timeout=1800)
    metrics = json.loads((workspace.root / "outputs/evaluate/metrics.json").read_text())
    before = json.loads((ARCHIVE.parent / "demo_metrics.json").read_text())
    for name in (
        "teacher_forcing_l1",
        "rollout_l1",
        "copy_last_l1",
        "gain_copy_last_percent",
        "gain_shuffled_actions_percent",
    ):
        assert metrics["val"][name] == pytest.approx(before["val"][name], rel=0.01), name
    answers = {question: judged["answer"] for question, judged in before["verdict"].items()}
    assert {question: metrics["verdict"][question]["answer"] for question in answers} == answers
