"""Reading random windows: this project's reader against a raw memory map and other libraries, in one run, warm page cache.

    python benchmarks/read.py                     # ViT-L's shape and the demo's
    python benchmarks/read.py 256x1024 --rounds 40
    python benchmarks/read.py 16x64 --only jepa-cache h5py

Every reader fills the same buffers with the same windows (8 windows of 8 steps); each is asked for all its steps once before, which
warms the page cache, and compared with what was written. In every round each reader reads the same random batches, in turning order;
"ratio" is the median over the rounds of the memory map's time over the reader's, so that a busy machine hits both. The quartiles
show the spread. Peers that are not installed are listed as missing (`pip install -e '.[bench]'`, see docs/benchmarks.md).
"""

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402

from benchmarks.readers import READERS, Fill, write_store  # noqa: E402
from jepa_cache.store.reader import ArrayReader  # noqa: E402

NUM_WINDOWS, WINDOW_STEPS = 8, 8
LIMIT = next(iter(READERS))
SAMPLE_S = 0.03  # so long at least does the memory map read in one round
NUM_COPIES = 7  # of the tokens on the disk, and room to spare


def open_readers(folder: Path, tokens: np.ndarray, names: list[str]) -> dict[str, Fill | str]:
    """The readers by name, after each has read everything once; for one that is not to be had, why."""
    readers: dict[str, Fill | str] = {}
    for name in names:
        module, make = READERS[name]
        if importlib.util.find_spec(module) is None:
            readers[name] = f"missing: {module} is not installed"
            continue
        try:
            fill = make(folder, tokens)
        except ImportError as error:
            readers[name] = f"missing: {module} cannot be imported ({error})"
            continue
        out = np.empty((1, WINDOW_STEPS, *tokens.shape[1:]), np.float16)
        for start in range(0, len(tokens) - WINDOW_STEPS + 1, WINDOW_STEPS):
            fill([start], out)
            assert np.array_equal(out[0], tokens[start : start + WINDOW_STEPS]), name
        readers[name] = fill
    return readers


def time_rounds(readers: dict[str, Fill], num_steps: int, out: np.ndarray, num_rounds: int) -> dict[str, np.ndarray]:
    """Seconds per batch of every reader in every round."""
    rng = np.random.default_rng(0)
    draw = lambda: rng.integers(0, num_steps - WINDOW_STEPS + 1, NUM_WINDOWS).tolist()  # noqa: E731
    begun = time.perf_counter()
    for _ in range(5):
        readers[LIMIT](draw(), out)
    num_batches = max(1, round(SAMPLE_S / ((time.perf_counter() - begun) / 5)))
    times: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(num_rounds):
        batches = [draw() for _ in range(num_batches)]
        names = list(readers)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            begun = time.perf_counter()
            for starts in batches:
                readers[name](starts, out)
            times[name].append((time.perf_counter() - begun) / num_batches)
    return {name: np.array(values) for name, values in times.items()}


def time_first_touch(
    store: Path, limit: Fill, num_steps: int, out: np.ndarray, num_rounds: int
) -> dict[str, np.ndarray]:
    """Seconds for reading a whole store once by a reader that was just opened, with and without checksums."""
    starts = np.arange(0, num_steps - num_steps % WINDOW_STEPS, WINDOW_STEPS)
    times: dict[str, list[float]] = {LIMIT: [], "checksums on": [], "checksums off": []}
    rng = np.random.default_rng(0)
    for _ in range(num_rounds):
        order = rng.permutation(starts).tolist()
        for name, values in times.items():
            begun = time.perf_counter()
            if name == LIMIT:
                for start in order:
                    limit([start], out[:1])
            else:
                with ArrayReader(store, verify_checksums=name == "checksums on") as reader:
                    for start in order:
                        reader.read(start, out[0])
            values.append(time.perf_counter() - begun)
    return {name: np.array(values) for name, values in times.items()}


def print_table(times: dict[str, np.ndarray], num_bytes: int, what: str) -> None:
    """Median time, rate, and ratio to the memory map with its quartiles."""
    print(f"{what:<26} {'median ms':>10} {'GB/s':>7} {'ratio':>7} {'quartiles':>15}")
    for name, values in times.items():
        low, ratio, high = np.percentile(times[LIMIT] / values, [25, 50, 75])
        median = np.median(values)
        print(
            f"{name:<26} {median * 1e3:>10.3f} {num_bytes / median / 1e9:>7.2f} {ratio:>7.2f} {low:>7.2f} {high:>7.2f}"
        )


def run_shape(num_tokens: int, width: int, num_steps: int, num_rounds: int, names: list[str], folder: Path) -> None:
    """Both tables of one shape of tokens."""
    tokens = np.random.default_rng(0).standard_normal((num_steps, num_tokens, width), np.float32).astype(np.float16)
    if shutil.disk_usage(folder).free < NUM_COPIES * tokens.nbytes:
        raise SystemExit(
            f"{folder} has no room for {NUM_COPIES} copies of {tokens.nbytes / 1e6:.0f} MB; name another by --folder"
        )
    out = np.zeros((NUM_WINDOWS, WINDOW_STEPS, num_tokens, width), np.float16)
    print(
        f"\n{num_steps} steps of {num_tokens} x {width} float16 ({tokens.nbytes / 1e6:.0f} MB); batches of {NUM_WINDOWS} windows "
        f"of {WINDOW_STEPS} steps ({out.nbytes / 1e6:.3g} MB); {num_rounds} rounds; load {os.getloadavg()[0]:.1f}"
    )
    readers = open_readers(folder, tokens, names)
    present = {name: reader for name, reader in readers.items() if not isinstance(reader, str)}
    print_table(time_rounds(present, num_steps, out, num_rounds), out.nbytes, "random windows")
    for name, reason in readers.items():
        if isinstance(reason, str):
            print(f"{name:<26} {reason}")
    first = time_first_touch(write_store(folder, tokens), present[LIMIT], num_steps, out, max(3, num_rounds // 4))
    print_table(first, tokens.nbytes, "whole store, first touch")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shapes", nargs="*", default=["256x1024", "16x64"], help="tokens x width")
    parser.add_argument("--steps", type=int, default=0, help="of the store; 0: 512 MiB of them, at most 8192")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", nargs="+", metavar="READER", help=", ".join(READERS))
    parser.add_argument("--folder", help="where the files are written; default the temporary folder")
    arguments = parser.parse_args()
    unknown = set(arguments.only or []) - set(READERS)
    if unknown:
        parser.error(f"unknown readers {sorted(unknown)}; known: {', '.join(READERS)}")
    names = [name for name in READERS if name == LIMIT or name in (arguments.only or READERS)]
    for shape in arguments.shapes:
        num_tokens, width = map(int, shape.split("x"))
        num_steps = arguments.steps or min(8192, (1 << 29) // (num_tokens * width * 2))
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            run_shape(num_tokens, width, num_steps, arguments.rounds, names, Path(folder))


if __name__ == "__main__":
    main()
