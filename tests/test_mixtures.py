"""Claims: cameras, phases and data sets of a mixture are parts of one manifest, with stores that are found again alone.

Real recordings of VPT, where the optional folder of them is there, go the whole way from files to metrics. It holds one pair, of which shorter and
shorter beginnings are packed: that proves the way and the formats, and nothing about learning.
"""

import csv
import itertools
import shutil
from contextlib import nullcontext

import av
import pytest
from accelerate.state import AcceleratorState

from jepa_cache.config.loading import load_config
from jepa_cache.data.dataset import TRAIN, CachedDataset
from jepa_cache.data.scaler import fit_scaler
from jepa_cache.encoding.run import encode_dataset
from jepa_cache.evaluation.run import evaluate_run
from jepa_cache.media.tar import pack_folder
from jepa_cache.store.root import CacheRoot
from jepa_cache.training.trainer import train
from tests.caches import OVERRIDES, no_pictures
from tests.droid_makers import make_episode, write_raw
from tests.makers import REAL_VPT, make_vpt_pair, write_vpt_tar
from tests.workspace import SUITE_SETTINGS, copy_settings

TINY = ("encoder=tiny", "predictor=tiny", "encode.device=cpu", *OVERRIDES)
DROID = ("dataset=droid_raw", "encode.fps=5")
PAIR = REAL_VPT / "trimmed_shabby-viridian-beaver-b064d8e1dc68-20220417-011815.mp4"
needs_vpt = pytest.mark.skipif(not PAIR.is_file(), reason=f"no real recordings in {REAL_VPT}")


class Checkout:
    """Settings, recordings and a cache in one folder; each call is a stage."""

    def __init__(self, folder):
        self.folder, self.root = copy_settings(folder / "checkout"), CacheRoot(folder / "cache")

    def config(self, *changes):
        return load_config(self.folder, [*TINY, *changes])

    def encode(self, *changes):
        config = self.config(*changes)
        return encode_dataset(config, config.dataset.inputs, base=self.folder, root=self.root)

    def train_and_evaluate(self, *changes, pictures=False):
        """Rows of train.csv, and the metrics."""
        config = self.config(*changes)
        dataset = CachedDataset(self.encode(*changes).manifest, self.root)
        segments = dataset.segments_of(TRAIN, config.split, config.filter)
        scaler = fit_scaler(dataset, segments, config.scaler)
        AcceleratorState._reset_state(reset_partial_state=True)
        result = train(config, dataset, scaler, self.folder / "outputs/train/run", base=self.folder)
        with nullcontext() if pictures else no_pictures():
            metrics = evaluate_run(config, dataset, result.weights, self.folder / "outputs/evaluate")
        dataset.close()
        with (result.run / "train.csv").open(newline="") as file:
            return list(csv.DictReader(file)), metrics


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_cameras_and_phases_are_parts_whose_stores_are_found_again_alone(checkout):
    for seed in range(2):
        write_raw(checkout.folder / "shards/droid_raw", make_episode(seed, 36))
    manifest = checkout.encode(*DROID, "encode.cameras=[exterior_1, wrist]", "encode.phases=all").manifest
    assert len({part.fingerprint for part in manifest.parts}) == len(manifest.parts) == 6
    assert {(part.camera, part.phase) for part in manifest.parts} == {
        (camera, phase) for camera in ("exterior_1", "wrist") for phase in range(3)
    }
    alone = checkout.encode(*DROID, "encode.cameras=[wrist]", "encode.phases=[1]")
    (part,) = alone.manifest.parts
    assert alone.num_encoded == 0
    assert part.fingerprint in {other.fingerprint for other in manifest.parts if other.camera == "wrist"}


def test_a_mixture_lists_its_data_sets_with_their_weights_and_trains_on_both(checkout):
    presets = checkout.folder / "configs/dataset"
    text = (presets / "vpt.yaml").read_text()
    for name in ("a", "b"):
        pairs = {f"{name}-{i}": make_vpt_pair(50, seed=10 * (name == "b") + i, size=(32, 32)) for i in range(4)}
        write_vpt_tar(checkout.folder / f"shards/{name}/{name}.tar", pairs)
        (presets / f"{name}.yaml").write_text(text.replace("[shards/vpt]", f"[shards/{name}]"))
    (presets / "both.yaml").write_text(text.replace("[shards/vpt]", "[]") + "mixture: {a: 1.0, b: 3.0}\n")
    manifest = checkout.encode("dataset=both").manifest
    assert [(part.dataset, part.weight) for part in manifest.parts] == [("a", 1.0), ("b", 3.0)]
    assert manifest.digest != manifest.fingerprint
    rows, metrics = checkout.train_and_evaluate("dataset=both")
    reported = [(float(row["jloss.a"]), float(row["jloss.b"])) for row in rows if row["jloss.a"] and row["jloss.b"]]
    assert reported and all(a != b for a, b in reported)
    assert 0 < metrics["val"]["teacher_forcing_l1"] < 2
    assert checkout.encode("dataset=b").num_encoded == 0


def test_a_mixture_of_two_action_spaces_is_refused(checkout):
    text = (SUITE_SETTINGS / "configs/dataset/vpt.yaml").read_text()
    (checkout.folder / "configs/dataset/both.yaml").write_text(text + "mixture: {vpt: 1.0, droid_raw: 1.0}\n")
    with pytest.raises(ValueError, match="must be a data set of action space 'vpt13'"):
        checkout.config("dataset=both")


def cut_pair(folder, name, num_frames):
    """The first frames of the pair and their lines; nothing is encoded again."""
    lines = PAIR.with_suffix(".jsonl").read_text().splitlines(keepends=True)
    (folder / f"{name}.jsonl").write_text("".join(lines[: num_frames + 1]))
    with av.open(str(PAIR)) as source, av.open(str(folder / f"{name}.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in itertools.islice(source.demux(video=0), num_frames):
            packet.stream = stream
            target.mux(packet)


@needs_vpt
def test_real_pairs_are_packed_encoded_trained_on_and_evaluated_and_too_many_look_alikes_stop_it(
    checkout, tmp_path, capsys
):
    (tmp_path / "in").mkdir()
    for number, num_frames in enumerate((445, 85, 65)):
        cut_pair(tmp_path / "in", f"pair-{number}", num_frames)
    look_alike = next((REAL_VPT / "counter_example").glob("*.mp4"))
    for path in (look_alike, look_alike.with_suffix(".jsonl"), next((REAL_VPT / "logs_only").glob("*.jsonl"))):
        shutil.copy(path, tmp_path / "in")
    report = pack_folder(tmp_path / "in", checkout.folder / "shards/vpt")
    assert report.num_episodes == 4 and len(report.skipped) == 1
    with pytest.raises(ValueError, match=r"1 of 4 recordings were skipped \(25%\)"):
        checkout.encode("dataset=vpt")
    said = capsys.readouterr()
    assert f"skipped: {look_alike.stem}" in said.out + said.err and not list(checkout.root.path.glob("manifests/*"))
    changes = "dataset=vpt", "encode.max_skipped_share=0.5", "split.val_share=0.5"
    manifest = checkout.encode(*changes).manifest
    assert [it["key"] for it in manifest.skipped] == [look_alike.stem] and manifest.num_steps == 112 + 22 + 17
    assert "445 frames, 446 lines" in str(manifest.notes)
    _, metrics = checkout.train_and_evaluate(*changes, pictures=True)
    assert 0 < metrics["val"]["teacher_forcing_l1"] < 2
    assert (checkout.folder / "outputs/evaluate/pictures/film1_1_frames.jpg").is_file()
