"""Processor time of a wanted frame by each decoder, on recordings of your own, in one thread.

    python benchmarks/decoders.py recordings/*.mp4 --every 1 4

PyAV and decord as `encode.decoder` uses them (decord's files are decoded by PyAV first, to find damage), decord alone, and torchcodec where it can be
imported, by exact seeking; all in pieces of 8 frames, opening included. Every round runs all of them, so that a busy machine hits each; ratios to
PyAV are medians over the rounds with their range. "same" says whether a decoder gave PyAV's bits.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from jepa_cache.encoding.decoding import PIECE_FRAMES
from jepa_cache.media.probe import probe_video
from jepa_cache.media.video import open_video

Frames = list[np.ndarray]


def pieces(frames: np.ndarray) -> list[np.ndarray]:
    """Frame numbers as they are asked for together."""
    return [frames[start : start + PIECE_FRAMES] for start in range(0, len(frames), PIECE_FRAMES)]


def by_us(decoder: str) -> Callable[[Path, np.ndarray], Frames]:
    """As stage one decodes."""

    def decode(path: Path, frames: np.ndarray) -> Frames:
        with open_video(path, decoder) as video:
            return [video.read(piece) for piece in pieces(frames)]

    return decode


def by_decord(path: Path, frames: np.ndarray) -> Frames:
    """By decord's own batch call."""
    import decord

    reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
    return [reader.get_batch(piece).asnumpy() for piece in pieces(frames)]


def by_torchcodec(path: Path, frames: np.ndarray) -> Frames:
    """By torchcodec's own batch call."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), num_ffmpeg_threads=1, seek_mode="exact", dimension_order="NHWC")
    return [decoder.get_frames_at(piece.tolist()).data.numpy() for piece in pieces(frames)]


def main() -> None:
    """Print one table for each frame step."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("videos", type=Path, nargs="+")
    parser.add_argument("--every", type=int, nargs="+", default=[1, 4], help="of the frames is wanted")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    decoders = {"pyav": by_us("pyav")}
    if find_spec("decord"):
        decoders |= {"decord, checked": by_us("decord"), "decord alone": by_decord}
    if find_spec("torchcodec"):
        decoders["torchcodec"] = by_torchcodec
    for every in options.every:
        wanted = {path: np.arange(0, probe_video(path).num_frames, every) for path in options.videos}
        total, first = sum(map(len, wanted.values())), options.videos[0]
        print(f"every {every} of {len(wanted)} recordings, {total} frames; load {os.getloadavg()[0]:.1f}")
        given = {name: np.concatenate(decode(first, wanted[first])) for name, decode in decoders.items()}
        taken_ms: dict[str, list[float]] = {name: [] for name in decoders}
        for _ in range(options.rounds):
            for name, decode in decoders.items():
                begun = time.process_time()
                for path, frames in wanted.items():
                    decode(path, frames)
                taken_ms[name].append(1e3 * (time.process_time() - begun) / total)
        for name, times in taken_ms.items():
            ratios = [one / other for one, other in zip(times, taken_ms["pyav"], strict=True)]
            print(
                f"  {name:<16} {statistics.median(times):.2f} ms a wanted frame, {statistics.median(ratios):.2f} of PyAV's "
                f"[{min(ratios):.2f}, {max(ratios):.2f}], same {np.array_equal(given[name], given['pyav'])}",
                flush=True,
            )


if __name__ == "__main__":
    main()
