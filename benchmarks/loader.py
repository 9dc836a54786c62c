"""How long training waits for the loader, and what the loader gives by itself: the real training loop on made features, on the CPU.

    python benchmarks/loader.py                       # predictor `small`: the demo's tokens and ViT-L's
    python benchmarks/loader.py 256x1024 --predictor base --steps 8

"waiting" is the share of a train step that the loop waits for a batch: the median and the largest over the train steps after the
first, which also waits for the first batch. "alone" is the loader without training. Everything lies in the page cache.
"""

import argparse
import contextlib
import csv
import io
import math
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TQDM_DISABLE"] = "1"

import numpy as np  # noqa: E402

from tests import caches  # noqa: E402

DEFAULTS = {"16x64": (32, 8), "256x1024": (2, 5)}
"""Batch size and train steps by shape; of other shapes, those of the second."""
ALONE_S = 2.0


def measure(shape: str, predictor: str, num_steps: int, folder: Path) -> str:
    """One line of the table."""
    from jepa_cache.config.loading import load_config
    from jepa_cache.data.dataset import TRAIN
    from jepa_cache.data.loader import WindowLoader
    from jepa_cache.data.windows import WindowIndex, WindowSampler
    from jepa_cache.training.trainer import train

    num_tokens, width = map(int, shape.split("x"))
    batch_size, default_steps = DEFAULTS.get(shape, DEFAULTS["256x1024"])
    num_steps = num_steps or default_steps
    side = math.isqrt(num_tokens)
    caches.GRID, caches.WIDTH = (side, side), width
    settings = (
        "window_steps=8",
        f"batch_size={batch_size}",
        f"num_steps={num_steps + 1}",
        "log_every=1",
        "validate_every=0",
    )
    schedule = ("num_warmup=1", "num_anneal=1", "checkpoint_every=1000000")
    cache = caches.make_cache(folder, *(f"train.{setting}" for setting in (*settings, *schedule)))
    config = replace(cache.config, predictor=load_config(ROOT, [f"predictor={predictor}"]).predictor)

    index = WindowIndex(cache.dataset.segments_of(TRAIN, config.split, config.filter), 8)
    loader, sampler = WindowLoader(cache.dataset, index, cache.scaler), WindowSampler(len(index), batch_size, seed=0)
    num_batches, begun = -1, 0.0
    for batch in loader.iterate(sampler.numbers(step) for step in range(1_000_000)):
        if num_batches < 0:
            begun, batch_bytes = time.perf_counter(), batch.tokens.nbytes
        num_batches += 1
        if time.perf_counter() - begun > ALONE_S:
            break
    alone = num_batches / (time.perf_counter() - begun)

    with contextlib.redirect_stdout(io.StringIO()):
        train(config, cache.dataset, cache.scaler, folder / "out", base=folder)
    with (folder / "out/train.csv").open() as file:
        rows = [
            {name: float(row[name]) for name in ("samples_per_s", "loader_wait_share")} for row in csv.DictReader(file)
        ][1:]
    waits = np.array([row["loader_wait_share"] for row in rows])
    step_s = np.median([batch_size / row["samples_per_s"] for row in rows])
    return (
        f"{shape:<10} {predictor:<9} {batch_size:>6} {len(rows):>6} {step_s * 1e3:>13.1f} {np.median(waits):>10.2%} "
        f"{waits.max():>10.2%} {alone * batch_size:>12.0f} {alone * batch_bytes / 1e9:>7.2f}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shapes", nargs="*", default=list(DEFAULTS), help="tokens x width; tokens a square")
    parser.add_argument("--predictor", default="small", help="preset of configs/predictor")
    parser.add_argument("--steps", type=int, default=0, help="train steps; 0: by the shape")
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; windows of 8 steps, float16, one loader thread")
    print(
        f"{'tokens':<10} {'predictor':<9} {'batch':>6} {'steps':>6} {'train step ms':>13} {'waiting':>10} {'largest':>10} "
        f"{'alone win/s':>12} {'GB/s':>7}"
    )
    for shape in arguments.shapes:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["JEPA_RUNS_HOME"] = f"{folder}/runs"
            print(measure(shape, arguments.predictor, arguments.steps, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
