"""Makers of small encoded data sets: VPT recordings through the whole stage one with the tiny encoder, and plain references."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import multiprocessing.context
import sqlite3
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr  # here and not first by a writer's thread: pytest rewrites its asserts, and Python 3.11 parses in one thread at a time

from jepa_cache.config.loading import load_config
from jepa_cache.config.schema import Config
from jepa_cache.data.dataset import CachedDataset
from jepa_cache.encoding.run import EncodeResult, encode_dataset
from jepa_cache.encoding.steps import StepPlan, plan_episode
from jepa_cache.store import layout
from jepa_cache.store.controls import iter_controls
from jepa_cache.store.digests import DigestTable, look_at
from jepa_cache.store.manifest import Manifest
from jepa_cache.store.reader import ArrayReader
from jepa_cache.store.recipe import canonical_json
from jepa_cache.store.root import CacheRoot
from tests.makers import make_vpt_pair, write_vpt_tar
from tests.workspace import SUITE_SETTINGS

SETTINGS = load_config(SUITE_SETTINGS, ["dataset=vpt"]).encode
STRIDE = 4  # 20 Hz video at 5 fps
BATCH = 8


def tiny_config(dataset: str = "vpt", **encode: object) -> Config:
    """Tiny encoder, batches of 8, CPU; keywords replace fields of the encode section."""
    config = load_config(SUITE_SETTINGS, [f"dataset={dataset}", "encoder=tiny", "encode.device=cpu"])
    return dataclasses.replace(config, encode=dataclasses.replace(config.encode, **{"batch_size": BATCH, **encode}))


def tiniest_config(dataset: str = "vpt", **encode: object) -> Config:
    """The least work that is still all of stage one: one block, four tokens of sixteen channels."""
    config = tiny_config(dataset, **encode)
    sizes = {"embed_dim": 16, "depth": 1, "num_heads": 1, "mlp_dim": 16, "resolution": 32}
    return dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, **sizes))


def plan_steps(
    num_frames: int,
    video_fps: float,
    *,
    times_s: np.ndarray | None = None,
    tubelet_size: int = 2,
    phase: int = 0,
    **encode: object,
) -> StepPlan:
    """`plan_episode` under the settings of the suite, of which some are others."""
    config = dataclasses.replace(SETTINGS, **encode)
    return plan_episode(num_frames, video_fps, config, tubelet_size=tubelet_size, phase=phase, times_s=times_s)


def make_tiny_tar(folder: Path, name: str, seed: int = 0, num_frames: int = 9) -> Path:
    """A tar shard of one recording of 32 x 32 pixels; another seed is another recording."""
    write_vpt_tar(folder / f"{name}.tar", {f"episode-{seed}": make_vpt_pair(num_frames, seed, size=(32, 32))})
    return folder


def make_tars(folder: Path, episodes: Mapping[str, Mapping[str, int]], *, first_seed: int = 0) -> Path:
    """Tar shards by name, each of the named recordings with so many frames; no two recordings are alike."""
    seed = first_seed
    for tar, recordings in episodes.items():
        pairs = {}
        for key, num_frames in recordings.items():
            pairs[key] = make_vpt_pair(num_frames, seed)
            seed += 1
        write_vpt_tar(folder / f"{tar}.tar", pairs)
    return folder


def encode(folder: Path, root: Path, config: Config | None = None, inputs: Sequence[str] = ()) -> EncodeResult:
    """Stage one on every tar below `folder`; its digest table lies beside the root."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(root.parent / f"{root.name}-state"))
        return encode_dataset(config or tiny_config(), inputs or [str(folder)], base=folder, root=CacheRoot(root))


def run_stage_one(folder: Path, root: CacheRoot, config: Config) -> Manifest:
    """The manifest of stage one on every tar below `folder`."""
    return encode_dataset(config, [str(folder)], base=folder, root=root).manifest


def all_files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read_everything(root: CacheRoot, manifest: Manifest) -> dict[str, object]:
    """All that stage two and the tools ever read of a manifest, by name and number of the store."""
    numbers: dict[str, object] = {}
    dataset = CachedDataset(manifest, root)
    try:
        numbers["segments"] = dataset.segments
        scheme = dataset.scheme
        groups = (manifest.width // 64,) if scheme.grouped else ()
        for number, (part, entry) in enumerate(manifest.stores):
            shape = entry.num_steps, manifest.num_tokens
            tokens = np.empty((*shape, manifest.width // scheme.codes_per_item), scheme.dtype)
            dataset.read_tokens(number, 0, tokens)
            numbers[f"{number} tokens"] = tokens
            if scheme.max_code is not None:
                scales = np.empty((*shape, *groups), np.float16 if scheme.grouped else np.float32)
                dataset.read_token_scales(number, 0, scales)
                numbers[f"{number} token_scales"] = scales
                for name, values in zip(("scales", "means"), dataset.channels(number), strict=True):
                    numbers[f"{number} channel_{name}"] = values
            numbers[f"{number} actions"], numbers[f"{number} states"] = dataset.controls(number)
            steps = dataset.steps(number)
            numbers |= {f"{number} {name}": steps.column(name).to_numpy() for name in steps.column_names}
            controls = root.controls(part.source_fingerprint, entry.unit_digest)
            with root.pulled([controls]):
                for key, columns in iter_controls(controls):
                    numbers |= {f"{number} {key} {name}": values for name, values in columns.items()}
    finally:
        dataset.close()
    return numbers


@contextmanager
def store_json(store: Path) -> Iterator[dict[str, Any]]:
    """What store.json of a store says, to be changed in the block; it gets the sha256 of what it says then."""
    path = store / "store.json"
    document = json.loads(path.read_bytes())
    yield document
    content = canonical_json({key: value for key, value in document.items() if key != "sha256"})
    path.write_bytes(canonical_json({**json.loads(content), "sha256": hashlib.sha256(content).hexdigest()}))


def replace_behind_the_table(table: DigestTable, path: Path, content: bytes) -> None:
    """Put other bytes into a file without the digest table noticing, as on a disk that keeps no change times."""
    digest = table.digest(path)
    path.write_bytes(content)
    with sqlite3.connect(table.path) as connection:
        row = (str(path), *look_at(path), digest)
        connection.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", row)


def same_numbers(one: object, other: object) -> bool:
    """Equal, NaN to NaN."""
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    return one == other


def forking_context() -> multiprocessing.context.ForkServerContext:
    """Processes that are forked from one which has imported what is slow, so that each of them starts at once."""
    context = multiprocessing.get_context("forkserver")
    slow = [
        "pyarrow.dataset",
        "webdataset.tariterators",
        "distributed",
        "torch._dynamo",
        "dvc.repo",
        "dvclive",
        "scmrepo.git",
    ]
    rooms = ["cli.export", "encoder.frozen", "encoding.verification", "store.collection", "training.trainer"]
    context.set_forkserver_preload([*slow, *(f"jepa_cache.{it}" for it in rooms), "tests.encoded", "tests.caches"])
    return context


def read_video(folder: Path, key: str) -> bytes:
    """The video of a recording, from whichever tar holds it (x264 does not make the same bytes twice)."""
    for path in folder.rglob("*.tar"):
        with tarfile.open(path) as tar:
            if f"{key}.mp4" in tar.getnames():
                return tar.extractfile(f"{key}.mp4").read()
    raise KeyError(key)


def decode_all(video: bytes) -> np.ndarray:
    """Every frame [F, h, w, 3] uint8 by plain PyAV."""
    with av.open(io.BytesIO(video)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def read_episodes(result: EncodeResult, root: Path) -> dict[str, dict[str, np.ndarray]]:
    """Per episode: tokens, actions, states and the columns of the step table, in the order of its steps."""
    cache, manifest, episodes = CacheRoot(root), result.manifest, {}
    for entry in manifest.entries:
        store = cache.tokens(manifest.fingerprint, entry.unit_digest)
        tokens = np.empty((entry.num_steps, manifest.num_tokens, manifest.width), np.float16)
        with ArrayReader(store) as reader:
            reader.read(0, tokens)
        columns = pq.read_table(store / layout.STEPS_FILE).to_pydict()
        columns = {name: np.array(values) for name, values in columns.items()} | {"tokens": tokens}
        actions = zarr.open_group(cache.actions(manifest.action_fingerprint, entry.unit_digest), mode="r")
        columns |= {name: np.asarray(actions[name][...]) for name in ("actions", "states")}
        for row in pq.read_table(store / layout.SEGMENTS_FILE).to_pylist():
            part = {name: values[row["start"] : row["stop"]] for name, values in columns.items()}
            old = episodes.get(row["episode"])
            episodes[row["episode"]] = (
                part if old is None else {name: np.concatenate([old[name], part[name]]) for name in part}
            )
    return episodes


def damage_middle(video: bytes) -> bytes:
    """The same container with its coded pictures overwritten from the middle on: it opens, and fails while decoding."""
    with av.open(io.BytesIO(video)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(video)
    for position, size in sorted(packets)[len(packets) // 2 :]:
        content[position : position + size] = b"\xff" * size
    return bytes(content)
