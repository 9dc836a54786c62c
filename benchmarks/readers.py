"""The readers that benchmarks/read.py compares: each writes the same tokens in its own form and reads windows of them.

Letters: B windows of T steps, N tokens a step, D wide. Peers that keep samples (litdata, MosaicML streaming) hold one sample per
step, since a window may begin at any step; whole windows as samples would take T times the space.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jepa_cache.store import layout
from jepa_cache.store.reader import ArrayReader
from jepa_cache.store.writer import TokenWriter, table

MAX_CHUNK_BYTES = 1 << 26  # of litdata, its default
Fill = Callable[[Sequence[int], np.ndarray], None]
"""Fills out [B, T, N, D] with the windows that begin at these steps."""


def write_store(folder: Path, tokens: np.ndarray) -> Path:
    """The tokens [n, N, D] as one store of this project."""
    path, num_steps = folder / "store.zarr", len(tokens)
    if path.is_dir():
        return path
    columns = {field.name: np.zeros(num_steps) for field in layout.STEPS_SCHEMA} | {"gui": np.zeros(num_steps, bool)}
    segments = {"segment": [0], "episode": ["a"], "start": [0], "stop": [num_steps], "step_hz": [5.0]}
    with TokenWriter(path, num_tokens=tokens.shape[1], width=tokens.shape[2]) as writer:
        writer.append(tokens)
        writer.publish(table(layout.STEPS_SCHEMA, columns), table(layout.SEGMENTS_SCHEMA, segments), {}, {})
    return path


def memmap(folder: Path, tokens: np.ndarray) -> Fill:
    """The limit: a flat file mapped into memory, gathered by slices."""
    tokens.tofile(folder / "raw.bin")
    mapped = np.memmap(folder / "raw.bin", tokens.dtype, "r", shape=tokens.shape)

    def fill(starts: Sequence[int], out: np.ndarray) -> None:
        for row, start in enumerate(starts):
            out[row] = mapped[start : start + out.shape[1]]

    return fill


def own(folder: Path, tokens: np.ndarray) -> Fill:
    """This project's reader."""
    reader = ArrayReader(write_store(folder, tokens))

    def fill(starts: Sequence[int], out: np.ndarray) -> None:
        for row, start in enumerate(starts):
            reader.read(start, out[row])

    return fill


def own_two_threads(folder: Path, tokens: np.ndarray) -> Fill:
    """This project's reader, the windows of a batch shared by two threads."""
    reader, pool = ArrayReader(write_store(folder, tokens)), ThreadPoolExecutor(2)

    def fill(starts: Sequence[int], out: np.ndarray) -> None:
        half = len(starts) // 2

        def part(rows: range) -> None:
            for row in rows:
                reader.read(starts[row], out[row])

        list(pool.map(part, (range(half), range(half, len(starts)))))

    return fill


def hdf5(folder: Path, tokens: np.ndarray) -> Fill:
    """An HDF5 file with chunks of as many steps as ours, read straight into the buffer."""
    import h5py

    path = folder / "tokens.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("tokens", data=tokens, chunks=(layout.CHUNK_STEPS, *tokens.shape[1:]))
    # A chunk cache that holds a few chunks: its default of 1 MiB would hold none of ViT-L's.
    dataset = h5py.File(path, "r", rdcc_nbytes=1 << 25)["tokens"]

    def fill(starts: Sequence[int], out: np.ndarray) -> None:
        for row, start in enumerate(starts):
            dataset.read_direct(out[row], np.s_[start : start + out.shape[1]])

    return fill


def zarr_python(folder: Path, tokens: np.ndarray) -> Fill:
    """zarr-python on our store."""
    import zarr

    array = zarr.open_group(write_store(folder, tokens), mode="r")["tokens"]

    def fill(starts: Sequence[int], out: np.ndarray) -> None:
        for row, start in enumerate(starts):
            out[row] = array[start : start + out.shape[1]]

    return fill


def tensorstore(folder: Path, tokens: np.ndarray) -> Fill:
    """Tensorstore on our store, all windows of a batch asked for at once."""
    import tensorstore as ts

    path = write_store(folder, tokens) / "tokens"
    array = ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}).result()

    def fill(starts: Sequence[int], out: np.ndarray) -> None:
        reads = [array[start : start + out.shape[1]].read() for start in starts]
        for row, read in enumerate(reads):
            out[row] = read.result()

    return fill


def litdata(folder: Path, tokens: np.ndarray) -> Fill:
    """litdata, by index."""
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    path = folder / "litdata"
    writer = BinaryWriter(str(path), chunk_bytes=max(MAX_CHUNK_BYTES, 2 * tokens[0].nbytes))
    for number, step in enumerate(tokens):
        writer[number] = {"tokens": step}
    writer.done()
    writer.merge()
    dataset = StreamingDataset(str(path))

    def fill(starts: Sequence[int], out: np.ndarray) -> None:
        for row, start in enumerate(starts):
            for step in range(out.shape[1]):
                out[row, step] = dataset[start + step]["tokens"]

    return fill


def streaming(folder: Path, tokens: np.ndarray) -> Fill:
    """MosaicML streaming (MDS), by index."""
    _pretend_torchvision()
    from streaming import MDSWriter, StreamingDataset

    path, shape = folder / "mds", ",".join(map(str, tokens.shape[1:]))
    with MDSWriter(out=str(path), columns={"tokens": f"ndarray:float16:{shape}"}) as writer:
        for step in tokens:
            writer.write({"tokens": step})
    dataset = StreamingDataset(local=str(path), batch_size=8, shuffle=False)

    def fill(starts: Sequence[int], out: np.ndarray) -> None:
        for row, start in enumerate(starts):
            for step in range(out.shape[1]):
                out[row, step] = dataset[start + step]["tokens"]

    return fill


def lance(folder: Path, tokens: np.ndarray) -> Fill:
    """Lance, one row per step, the windows of a batch taken at once."""
    import lance as library
    import pyarrow as pa

    values = pa.FixedSizeListArray.from_arrays(pa.array(tokens.reshape(-1)), tokens[0].size)
    library.write_dataset(pa.table({"tokens": values}), str(folder / "tokens.lance"))
    dataset = library.dataset(str(folder / "tokens.lance"))

    def fill(starts: Sequence[int], out: np.ndarray) -> None:
        steps = (np.asarray(starts)[:, None] + np.arange(out.shape[1])).reshape(-1)
        column = dataset.take(steps.tolist(), columns=["tokens"]).column("tokens").combine_chunks()
        out.reshape(-1)[:] = column.flatten().to_numpy(zero_copy_only=True)

    return fill


READERS: dict[str, tuple[str, Callable[[Path, np.ndarray], Fill]]] = {
    "np.memmap (the limit)": ("numpy", memmap),
    "jepa-cache": ("numpy", own),
    "jepa-cache, 2 threads": ("numpy", own_two_threads),
    "h5py": ("h5py", hdf5),
    "tensorstore": ("tensorstore", tensorstore),
    "zarr-python": ("zarr", zarr_python),
    "lance": ("lance", lance),
    "litdata": ("litdata", litdata),
    "MosaicML streaming": ("streaming", streaming),
}
"""Name to the module it needs and its maker."""


def _pretend_torchvision() -> None:
    """Let `streaming` be imported without torchvision, which it names for its image sets only (not used here)."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return
    # transformers asks whether torchvision is there, so it must be imported before.
    importlib.import_module("transformers.feature_extraction_utils")
    importlib.import_module("transformers.tokenization_utils_base")
    for name, attribute in (("", None), (".transforms", None), (".transforms.functional", "to_tensor")):
        module = sys.modules[f"torchvision{name}"] = types.ModuleType(f"torchvision{name}")
        if attribute:
            setattr(module, attribute, None)
    datasets = sys.modules["torchvision.datasets"] = types.ModuleType("torchvision.datasets")
    datasets.VisionDataset = object
