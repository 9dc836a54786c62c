"""Frames per second of each reader with its decoder, against the decoder alone, on one thread.

    python benchmarks/sources.py                          # what lies in ../shared/data, else a made VPT recording
    python benchmarks/sources.py vpt=shards/vpt           # PRESET=INPUT, presets of configs/dataset

Every frame of every recording is decoded, in order, in batches of 32. "reading" is the time that the source takes to yield
recordings (tar, JSON, parquet, packet counts); in stage one it overlaps with decoding in other threads. Peak memory is that of
the process, after a third of the recordings and at the end: it must not grow.
"""

import os
import resource
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402

from jepa_cache.config.loading import load_config  # noqa: E402
from jepa_cache.episode import Episode  # noqa: E402
from jepa_cache.media.packing import pack_folder  # noqa: E402
from jepa_cache.media.video import open_video  # noqa: E402
from jepa_cache.sources import build_source, list_sources  # noqa: E402

DATA = ROOT.parent / "shared/data"
GR1_FOLDER = "other/lerobot_v2_gr1/demo_data/robot_sim.PickNPlace"
NUM_COPIES = 9
BATCH_FRAMES = 32
GR1 = {"camera": "observation.images.ego_view", "actions": ["action"], "states": ["observation.state"]}


def default_cases(folder: Path) -> list[tuple[str, dict, str]]:
    """(source, options, input) of what is at hand; the one VPT recording is packed several times under other names."""
    pairs = folder / "pairs"
    pairs.mkdir()
    real = sorted((DATA / "vpt").glob("*.mp4"))
    if not real:
        from tests.makers import make_vpt_pair

        (folder / "made.mp4").write_bytes((made := make_vpt_pair(400, size=(360, 640)))[0])
        (folder / "made.jsonl").write_bytes(made[1])
        real = [folder / "made.mp4"]
    for copy in range(NUM_COPIES):
        for suffix in ("mp4", "jsonl"):
            (pairs / f"{copy}-{real[0].stem}.{suffix}").symlink_to(real[0].with_suffix(f".{suffix}"))
    pack_folder(pairs, folder / "tars")
    cases = [("vpt", {}, str(folder / "tars"))]
    if "lerobot" in list_sources() and (DATA / GR1_FOLDER).is_dir():
        cases.append(("lerobot", GR1, str(DATA / GR1_FOLDER)))
    return cases


def named_cases(arguments: list[str]) -> list[tuple[str, dict, str]]:
    """(source, options, input) of PRESET=INPUT arguments."""
    cases = []
    for argument in arguments:
        preset, equals, given = argument.partition("=")
        if not equals:
            raise SystemExit(f"arguments are PRESET=INPUT; got {argument!r}")
        dataset = load_config(ROOT, [f"dataset={preset}"]).dataset
        cases.append((dataset.source, dict(dataset.source_options), given))
    return cases


def measure(name: str, options: dict, given: str) -> str:
    """Read and decode everything; one line of the table."""
    source = build_source(name, options)
    read_s = decode_s = 0.0
    num_frames, num_recordings, num_skipped, peaks = 0, 0, 0, []
    for unit in source.list_units([given], Path.cwd()):
        recordings = source.iter_episodes(unit)
        while True:
            start = time.perf_counter()
            recording = next(recordings, None)
            read_s += time.perf_counter() - start
            if recording is None:
                break
            if not isinstance(recording, Episode):
                num_skipped += 1
                continue
            start = time.perf_counter()
            with open_video(recording.video, first_frame=recording.first_frame) as video:
                indices = np.arange(len(recording.frame_ticks))
                for first in range(0, len(indices), BATCH_FRAMES):
                    num_frames += len(video.read(indices[first : first + BATCH_FRAMES]))
                decoder = f"{video.decoder}/{video.info.codec}"
                size = f"{video.info.width}x{video.info.height}"
            decode_s += time.perf_counter() - start
            num_recordings += 1
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    if not num_recordings:
        return f"{name:<12} no recording could be read ({num_skipped} skipped)"
    alone, both = num_frames / decode_s, num_frames / (decode_s + read_s)
    return (
        f"{name:<12} {decoder:<14} {size:<10} {num_recordings:>10} {num_skipped:>8} {num_frames:>8} {alone:>10.0f} {both:>10.0f} "
        f"{1 - both / alone:>8.1%} {peaks[len(peaks) // 3]:>8.0f} {peaks[-1]:>8.0f}"
    )


def main() -> None:
    """Print the table."""
    print(
        f"{'source':<12} {'decoder':<14} {'size':<10} {'recordings':>10} {'skipped':>8} {'frames':>8} {'alone /s':>10} "
        f"{'reader /s':>10} {'reading':>8} {'MiB 1/3':>8} {'MiB end':>8}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for case in named_cases(sys.argv[1:]) or default_cases(Path(folder)):
            try:
                print(measure(*case), flush=True)
            except ValueError as error:
                print(f"{case[0]:<12} {error}")


if __name__ == "__main__":
    main()
