"""What stage one does around the encoder, without one: decoders that only sleep, and the writer of stores.

    python benchmarks/feeding.py decoders              # how far N decoding threads are from N times one thread
    python benchmarks/feeding.py writer                # steps/s of ViT-L's tokens (256 x 1024) for each stored dtype

The decoders sleep in place of decoding, so their scaling is that of the queue between them and the encoder, on any machine: episodes
of 100, 384 and 1,500 frames in batches of 64 uint8 frames of 256 px. The writer's rate is also given by processor time,
that of all its threads, publishing and checking included.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from jepa_cache.encoding import decoding
from jepa_cache.encoding.decoding import Decoders
from jepa_cache.episode import Episode
from jepa_cache.sources import Unit
from jepa_cache.store import layout
from jepa_cache.store.quantisation import CODECS
from jepa_cache.store.writer import TokenWriter, table

PIECE_S = 0.02  # to "decode" 8 frames
EPISODES_PER_THREAD = 6
SIDE = 256


class SleepingVideo:
    """A video whose frames take time and are nothing."""

    decoder = "none"

    def __enter__(self) -> "SleepingVideo":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def iter_frames(self, frames: np.ndarray) -> Iterator[np.ndarray]:
        """Take as long as decoding would."""
        time.sleep(PIECE_S * len(frames) / decoding.PIECE_FRAMES)
        READ.append((time.perf_counter(), int(frames[0]), len(frames)))
        yield from np.zeros((len(frames), 4, 4, 3), np.uint8)


READ: list[tuple[float, int, int]] = []  # when, the first frame, how many


def measure_decoders(num_threads: int, length: int, budget_mib: int) -> tuple[float, float]:
    """Frames a second from the start until the last episode is begun, after which threads run out of work; and the most MiB held."""
    num_episodes = EPISODES_PER_THREAD * num_threads + 1
    controls, frames = {"x": np.zeros(length, bool)}, np.arange(length)
    source = SimpleNamespace(
        iter_episodes=lambda _: (Episode(str(n), b"", 20.0, controls, frames, length) for n in range(num_episodes))
    )
    encode = SimpleNamespace(num_decoders=num_threads, decode_ahead_mib=budget_mib, batch_size=64, decoder="auto")
    plan = lambda num_frames, *_: SimpleNamespace(inputs=np.arange(num_frames)[:, None])  # noqa: E731
    group = SimpleNamespace(encode=encode, source=source, plan=plan)
    decoding.open_video = lambda *_, **__: SleepingVideo()
    pixels = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8)
    READ.clear()
    begun = time.perf_counter()
    with Decoders(group, [Unit("unit", ())], lambda piece: pixels.expand(len(piece), -1, -1, -1)) as decoders:
        total = sum(len(batch.pixels) for _, streams in decoders for stream in streams for batch in stream)
    assert total == num_episodes * length
    end = max(when for when, first, _ in READ if first == 0)
    rate = sum(count for when, _, count in READ if when <= end) / (end - begun)
    return rate, decoders.budget.peak_bytes / 2**20


def measure_writer(dtype: str, num_steps: int, folder: Path) -> tuple[float, float]:
    """Steps a second by the clock and by processor time."""
    batch = np.random.default_rng(0).standard_normal((64, 256, 1024), np.float32).astype(np.float16)
    if CODECS[dtype].given == "uint16":
        batch = batch.view(np.uint16) & 0x3FFF
    columns = {field.name: np.arange(num_steps) for field in layout.STEPS_SCHEMA} | {"gui": np.zeros(num_steps, bool)}
    segments = {"segment": [0], "episode": ["a"], "start": [0], "stop": [num_steps], "step_hz": [5.0]}
    begun, begun_cpu = time.perf_counter(), time.process_time()
    with TokenWriter(folder / "a.zarr", num_tokens=256, width=1024, dtype=dtype) as writer:
        for start in range(0, num_steps, len(batch)):
            writer.append(batch[: num_steps - start])
        writer.publish(table(layout.STEPS_SCHEMA, columns), table(layout.SEGMENTS_SCHEMA, segments), {}, {})
    return num_steps / (time.perf_counter() - begun), num_steps / (time.process_time() - begun_cpu)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["decoders", "writer"])
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--frames", type=int, nargs="+", default=[100, 384, 1500], help="of an episode")
    parser.add_argument("--budget-mib", type=int, default=2560)
    parser.add_argument("--steps", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    if arguments.what == "decoders":
        for length in arguments.frames:
            alone, _ = measure_decoders(1, length, arguments.budget_mib)
            for num_threads in arguments.threads:
                rate, peak_mib = measure_decoders(num_threads, length, arguments.budget_mib)
                share = rate / alone / num_threads
                print(
                    f"{length:>5} frames, {num_threads:>2} threads: {share:.0%} of ideal, {peak_mib:.0f} MiB",
                    flush=True,
                )
        return
    for dtype in CODECS:
        rates = []
        for _ in range(arguments.rounds):
            with tempfile.TemporaryDirectory() as folder:
                rates.append(measure_writer(dtype, arguments.steps, Path(folder)))
        clock, processor = np.array(rates).T
        print(
            f"{dtype:<12} {np.median(clock):>6.0f} steps/s by the clock, {np.median(processor):>6.0f} by processor time "
            f"[{processor.min():.0f}, {processor.max():.0f}]",
            flush=True,
        )


if __name__ == "__main__":
    main()
