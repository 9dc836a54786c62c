"""Makers of tiny LeRobot data sets in the published layouts: v2.1 (files per episode) and v3.0 (packed files)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.makers import make_video

CAMERA = "observation.images.top"
FPS = 10
WIDTHS = {"observation.state": 3, "action": 2}


@lru_cache(maxsize=16)
def cached_video(num_frames: int, seed: int, fps: int = FPS) -> bytes:
    """The same tiny video, encoded once per test run."""
    return make_video(num_frames, seed, fps=fps)


def make_rows(index: int, num_rows: int) -> dict[str, Any]:
    """Columns of one episode as LeRobot writes them."""
    rng = np.random.default_rng(index)
    frames = np.arange(num_rows)
    numbers = {
        name: pa.array(list(rng.normal(size=(num_rows, width)).astype(np.float32))) for name, width in WIDTHS.items()
    }
    return {
        **numbers,
        "is_episode_successful": np.full(num_rows, index % 2 == 0),
        "timestamp": (frames / FPS).astype(np.float32),
        "frame_index": frames,
        "episode_index": np.full(num_rows, index),
    }


def write_info(root: Path, version: str, **changes: Any) -> None:
    """meta/info.json with the published templates of the version."""
    data, video = (
        "chunk-{episode_chunk:03d}/episode_{episode_index:06d}",
        "chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}",
    )
    if version == "v3.0":
        data, video = (
            "chunk-{chunk_index:03d}/file-{file_index:03d}",
            "{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}",
        )
    info = {
        "codebase_version": version,
        "fps": FPS,
        "chunks_size": 1000,
        "data_path": f"data/{data}.parquet",
        "video_path": f"videos/{video}.mp4",
        "features": {
            CAMERA: {"dtype": "video", "names": ["height", "width", "channels"]},
            "observation.images.still": {"dtype": "image", "names": None},
            "observation.state": {"dtype": "float32", "names": {"motors": ["pan", "lift", "grip"]}},
            "action": {"dtype": "float32", "names": ["pan", "lift"]},
        },
    }
    (root / "meta").mkdir(parents=True, exist_ok=True)
    (root / "meta" / "info.json").write_text(json.dumps({**info, **changes}))


def write_v2(root: Path, lengths: Mapping[int, int], *, version: str = "v2.1", **info: Any) -> Path:
    """A v2 data set of episodes: index to number of frames."""
    write_info(root, version, **info)
    lines = []
    for index, length in lengths.items():
        data = root / f"data/chunk-{index // 1000:03d}/episode_{index:06d}.parquet"
        video = root / f"videos/chunk-{index // 1000:03d}/{CAMERA}/episode_{index:06d}.mp4"
        for path in (data, video):
            path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(make_rows(index, length)), data)
        video.write_bytes(cached_video(length, index % 3))
        lines.append(json.dumps({"episode_index": index, "tasks": ["x"], "length": length}) + "\n")
    (root / "meta" / "episodes.jsonl").write_text("".join(lines))
    return root


def write_v3(root: Path, files: Sequence[Mapping[int, int]], **info: Any) -> Path:
    """A v3 data set; each entry of `files` is one parquet file and one mp4: episode index to number of frames."""
    write_info(root, "v3.0", **info)
    listed: list[dict[str, Any]] = []
    for number, lengths in enumerate(files):
        data = root / f"data/chunk-000/file-{number:03d}.parquet"
        video = root / f"videos/{CAMERA}/chunk-000/file-{number:03d}.mp4"
        for path in (data, video):
            path.parent.mkdir(parents=True, exist_ok=True)
        tables, from_s = [], 0.0
        for index, length in lengths.items():
            tables.append(pa.table(make_rows(index, length)))
            to_s = from_s + length / FPS
            places = {"data/chunk_index": 0, "data/file_index": number, f"videos/{CAMERA}/chunk_index": 0}
            places |= {f"videos/{CAMERA}/file_index": number, f"videos/{CAMERA}/from_timestamp": from_s}
            listed.append({"episode_index": index, "length": length, **places, f"videos/{CAMERA}/to_timestamp": to_s})
            from_s = to_s
        pq.write_table(pa.concat_tables(tables), data)
        video.write_bytes(cached_video(sum(lengths.values()), number % 3))
    write_list(root, listed)
    return root


def write_list(root: Path, listed: Sequence[Mapping[str, Any]]) -> None:
    """meta/episodes of a v3 data set."""
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(entry) for entry in listed]), path)


def read_list(root: Path) -> list[dict[str, Any]]:
    """meta/episodes of a v3 data set."""
    return pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
