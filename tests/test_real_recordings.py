"""Claims: real VPT recordings go the way that the README describes, from a folder of pairs to metrics.

There is one real pair, so shorter and shorter beginnings of it are packed as several recordings: that proves the way and the
formats, and nothing about learning. Skipped where the optional folder of real recordings is absent.
"""

import itertools
import json
import resource
import shutil

import av
import pytest

from tests.makers import REAL_VPT
from tests.workspace import Workspace

PAIR = "trimmed_shabby-viridian-beaver-b064d8e1dc68-20220417-011815"

pytestmark = pytest.mark.skipif(
    not (REAL_VPT / f"{PAIR}.mp4").is_file(), reason=f"no real VPT recordings in {REAL_VPT}"
)

VITL_WITHOUT_WEIGHTS = """
embed_dim: 1024
depth: 24
num_heads: 16
mlp_dim: 4096
patch_size: 16
tubelet_size: 2
resolution: 256
rope: tiled
crop: ac
mean: [0.485, 0.456, 0.406]
std: [0.229, 0.224, 0.225]
compute_dtype: float32
batch_size: 4
weights: null
weights_entry: null
weights_sha256: null
random_seed: 0
"""


@pytest.fixture
def workspace(tmp_path):
    checkout = Workspace(tmp_path)
    checkout.edit("params.yaml", "dataset: sample", "dataset: vpt")
    return checkout


def copy_pairs(folder, names):
    folder.mkdir()
    for name in names:
        for suffix in ("mp4", "jsonl"):
            shutil.copy(REAL_VPT / f"{PAIR}.{suffix}", folder / f"{name}.{suffix}")


def cut_pair(folder, name, num_frames):
    """The first frames of the pair and their lines; nothing is encoded again."""
    lines = (REAL_VPT / f"{PAIR}.jsonl").read_text().splitlines(keepends=True)
    (folder / f"{name}.jsonl").write_text("".join(lines[: num_frames + 1]))
    with av.open(str(REAL_VPT / f"{PAIR}.mp4")) as source, av.open(str(folder / f"{name}.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in itertools.islice(source.demux(video=0), num_frames):
            packet.stream = stream
            target.mux(packet)


def test_a_folder_of_real_pairs_is_packed_encoded_trained_on_and_evaluated(workspace, tmp_path):
    (tmp_path / "recordings").mkdir()
    for cut, letter in enumerate("abcdef"):
        cut_pair(tmp_path / "recordings", f"{PAIR}-{letter}", 445 - 40 * cut)
    shutil.copy(next((REAL_VPT / "logs_only").glob("*.jsonl")), tmp_path / "recordings")
    output = workspace.run("jepa-cache", "pack", str(tmp_path / "recordings"), "shards/vpt")
    assert "packed 6 recordings" in output and "skipped 1 files" in output

    output = workspace.python("stages/encode.py")
    assert "6 episodes, 522 frames" in output
    assert "445 frames, 446 lines" in output
    workspace.python("stages/fit_scaler.py")
    workspace.python("stages/train_predictor.py")
    workspace.python("stages/evaluate.py")
    metrics = json.loads((workspace.root / "outputs/evaluate/metrics.json").read_text())
    assert 0 < metrics["val"]["teacher_forcing_l1"] < 2
    assert (workspace.root / "outputs/evaluate/pictures/strip1.png").is_file()


def test_the_look_alike_is_skipped_by_name_and_too_many_of_them_stop_the_stage(workspace, tmp_path):
    other = next((REAL_VPT / "counter_example").glob("*.mp4"))
    copy_pairs(tmp_path / "recordings", ["real"])
    for suffix in (".mp4", ".jsonl"):
        shutil.copy(other.with_suffix(suffix), tmp_path / "recordings")
    workspace.run("jepa-cache", "pack", str(tmp_path / "recordings"), "shards/vpt")
    output = workspace.python("stages/encode.py", fails=True)
    assert f"skipped: {other.stem}" in output and "1 of 2 recordings were skipped (50%)" in output
    assert not (workspace.root / "outputs/encode/manifest.json").exists()
    output = workspace.python("stages/encode.py", "encode.max_skipped_share=0.5")
    assert "1 episodes" in output and "1 skipped" in output


def test_a_full_size_encoder_fits_and_gives_full_size_steps(workspace, tmp_path, capsys):
    (workspace.root / "configs/encoder/vitl_random.yaml").write_text(VITL_WITHOUT_WEIGHTS)
    copy_pairs(tmp_path / "recordings", ["real"])
    workspace.run("jepa-cache", "pack", str(tmp_path / "recordings"), "shards/vpt")
    # 445 frames at 20 Hz and stride 28 give 16 sampled ones.
    output = workspace.python("stages/encode.py", "encoder=vitl_random", "encode.fps=0.72")
    peak_mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    with capsys.disabled():
        print(
            f"\nViT-L, 256 px: {next(line for line in output.splitlines() if line.startswith('encoded'))}; peak {peak_mib:.0f} MiB"
        )
    assert "16 frames, 8.4 MB of tokens" in output
    assert "16 steps of 256 x 1024 tokens" in output
    manifest = json.loads((workspace.root / "outputs/encode/manifest.json").read_text())
    assert (manifest["num_tokens"], manifest["width"], manifest["grid"]) == (256, 1024, [16, 16])
