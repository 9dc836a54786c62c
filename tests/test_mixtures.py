"""Claims: cameras, phases and data sets of a mixture are parts of one manifest, with stores that are found again alone.

DROID goes the whole way from raw folders to metrics.

Made episodes; the real ones too where the optional folder of recordings is there.
"""

import csv
import json

import pytest

from jepa_cache.config.loading import load_config
from jepa_cache.store.manifest import read_manifest
from tests.droid_makers import REAL_DROID, make_episode, read_real, write_raw
from tests.makers import make_vpt_pair, write_vpt_tar
from tests.workspace import Workspace

DROID = ("dataset=droid_raw", "encode.fps=5")


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path)


def manifest_of(workspace):
    return read_manifest(workspace.root / "outputs/encode/manifest.json")


def test_cameras_and_phases_are_parts_whose_stores_are_found_again_alone(workspace):
    for seed in range(3):
        write_raw(workspace.root / "shards/droid_raw", make_episode(seed, 60))
    output = workspace.python("stages/encode.py", *DROID, "encode.cameras=[exterior_1, wrist]", "encode.phases=all")
    manifest = manifest_of(workspace)
    assert len({part.fingerprint for part in manifest.parts}) == len(manifest.parts) == 6, output
    assert {(part.camera, part.phase) for part in manifest.parts} == {
        (camera, phase) for camera in ("exterior_1", "wrist") for phase in range(3)
    }
    stores = workspace.stores()
    output = workspace.python("stages/encode.py", *DROID, "encode.cameras=[wrist]", "encode.phases=[1]")
    assert "nothing to encode" in output and workspace.stores() == stores
    (part,) = manifest_of(workspace).parts
    assert part.fingerprint in {other.fingerprint for other in manifest.parts if other.camera == "wrist"}


def test_a_mixture_lists_its_data_sets_with_their_weights_and_trains_on_both(workspace):
    for name in ("a", "b"):
        pairs = {f"{name}-{i}": make_vpt_pair(80, seed=10 * (name == "b") + i) for i in range(4)}
        write_vpt_tar(workspace.root / f"shards/{name}/{name}.tar", pairs)
        text = (workspace.root / "configs/dataset/vpt.yaml").read_text()
        (workspace.root / f"configs/dataset/{name}.yaml").write_text(text.replace("[shards/vpt]", f"[shards/{name}]"))
    mixture = (workspace.root / "configs/dataset/vpt.yaml").read_text().replace("[shards/vpt]", "[]")
    (workspace.root / "configs/dataset/both.yaml").write_text(mixture + "mixture: {a: 1.0, b: 3.0}\n")
    workspace.edit("params.yaml", "dataset: sample", "dataset: both")
    workspace.python("stages/encode.py")
    manifest = manifest_of(workspace)
    assert [(part.dataset, part.weight) for part in manifest.parts] == [("a", 1.0), ("b", 3.0)]
    assert manifest.digest != read_manifest(workspace.root / "outputs/encode/manifest.json").fingerprint
    workspace.python("stages/fit_scaler.py")
    workspace.python("stages/train_predictor.py")
    with (workspace.root / "outputs/train/run/train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    told_apart = [(float(row["jloss.a"]), float(row["jloss.b"])) for row in rows if row["jloss.a"] and row["jloss.b"]]
    assert told_apart and all(a != b for a, b in told_apart)
    workspace.python("stages/evaluate.py")
    stores = workspace.stores()
    assert "nothing to encode" in workspace.python("stages/encode.py", "dataset=b") and workspace.stores() == stores


def test_a_mixture_of_two_action_spaces_is_refused(workspace):
    text = (workspace.root / "configs/dataset/vpt.yaml").read_text()
    (workspace.root / "configs/dataset/both.yaml").write_text(text + "mixture: {vpt: 1.0, droid_raw: 1.0}\n")
    with pytest.raises(ValueError, match="must be a data set of action space 'vpt13'"):
        load_config(workspace.root, ["dataset=both"])


@pytest.mark.skipif(not REAL_DROID.exists(), reason=f"no real recordings in {REAL_DROID}")
def test_real_droid_episodes_go_from_raw_folders_to_metrics_with_idle_steps_cut(workspace):
    for episode in read_real():
        write_raw(workspace.root / "shards/droid_raw", episode)
    workspace.edit("params.yaml", "dataset: sample", "dataset: droid_raw")
    output = workspace.python("stages/encode.py", "encode.fps=5")
    assert "9 episodes, 700 frames" in output, output
    for stage in ("fit_scaler", "train_predictor", "evaluate"):
        workspace.python(f"stages/{stage}.py", "encode.fps=5", "filter.drop_idle=true")
    metrics = json.loads((workspace.root / "outputs/evaluate/metrics.json").read_text())
    assert 0 < metrics["val"]["teacher_forcing_l1"] < 2
