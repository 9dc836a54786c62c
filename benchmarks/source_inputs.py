"""Inputs of benchmarks/sources.py: real recordings of ../shared/data laid out for each source, made ones where they are absent."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from jepa_cache.media.tar import pack_folder
from tests.droid_makers import (
    CAMERAS,
    REAL_DROID,
    Recorded,
    decode,
    droid_features,
    make_episode,
    read_real,
    to_example,
    write_raw,
    write_tfds,
)
from tests.makers import REAL_VPT, make_video, make_vpt_pair
from tests.sources import examples
from tests.sources.lerobot_makers import make_rows, write_info, write_list

REAL_GR1 = REAL_VPT.parent / "other/lerobot_v2_gr1/demo_data/robot_sim.PickNPlace"
GR1 = {"camera": "observation.images.ego_view", "actions": ["action"], "states": ["observation.state"]}
NUM_VPT_COPIES = 5
NUM_PACKED = 24
NUM_TINY = 40
RLDS_SIZE = (180, 320)
RAW_SIZE = (720, 1280)
NUM_RAW = 2


@dataclass(frozen=True)
class Case:
    """One line of the table: a name, a source with its options, and its input."""

    name: str
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    given: str = ""


def default_cases(folder: Path, only: str = "") -> Iterator[Case]:
    """One case per form of every source; inputs are written below `folder` when they are asked for."""
    raw = {"camera": "exterior_1"}
    cases: Sequence[tuple[Case, Callable[[Path], Path]]] = (
        (Case("vpt", "vpt"), _write_vpt),
        (Case("droid_raw mono", "droid_raw", raw), lambda folder: _write_raw(folder, stereo=False)),
        (Case("droid_raw stereo", "droid_raw", raw), lambda folder: _write_raw(folder, stereo=True)),
        (Case("droid_rlds", "droid_rlds"), _write_rlds),
        (Case("lerobot v2", "lerobot", GR1), _write_lerobot),
        (Case("lerobot v3", "lerobot", GR1), _write_packed),
        (Case("mp4_json", "mp4_json"), _write_pairs),
    )
    for case, write in cases:
        if only in case.name:
            yield replace(case, given=str(write(folder / case.name.replace(" ", "_"))))


def long_cases(folder: Path, only: str = "") -> Iterator[Case]:
    """Tiny recordings of every source, to be read again and again: the examples of its contract test."""
    from jepa_cache.sources import list_sources

    for source in list_sources():
        for form, example in getattr(examples, source)().items():
            if only in (name := f"{source} {form}"):
                example.write(folder / name.replace(" ", "_"), range(NUM_TINY))
                yield Case(name, source, example.options, str(folder / name.replace(" ", "_")))


def _write_vpt(folder: Path) -> Path:
    """One recording, packed several times under other names."""
    pairs = folder / "pairs"
    pairs.mkdir(parents=True)
    real = sorted(REAL_VPT.glob("*.mp4"))
    if not real:
        (folder / "made.mp4").write_bytes((made := make_vpt_pair(400, size=(360, 640)))[0])
        (folder / "made.jsonl").write_bytes(made[1])
        real = [folder / "made.mp4"]
    for copy in range(NUM_VPT_COPIES):
        for suffix in ("mp4", "jsonl"):
            (pairs / f"{copy}-{real[0].stem}.{suffix}").symlink_to(real[0].with_suffix(f".{suffix}"))
    pack_folder(pairs, folder / "tars")
    return folder / "tars"


def _episodes() -> list[Recorded]:
    if REAL_DROID.exists():
        return [episode.thin(3) for episode in read_real()]
    return [make_episode(seed, 150, size=(192, 320)) for seed in range(9)]


def _write_raw(folder: Path, *, stereo: bool) -> Path:
    """Pictures enlarged to the size of the release's: the clips at hand are a quarter of it in each direction."""
    for episode in _episodes()[:NUM_RAW]:
        frames = [_enlarge(frame) for frame in decode(episode.videos["exterior_1"])]
        if stereo:
            frames = [np.concatenate((frame, frame), axis=1) for frame in frames]
        write_raw(folder, replace(episode, videos={**episode.videos, "exterior_1": _encode(frames)}), stereo=stereo)
    return folder


def _write_rlds(folder: Path) -> Path:
    """Frames of the size of DROID's, as JPEGs of some 20 kB as there; each three times, for episodes of usual length."""
    made = []
    for episode in _episodes():
        images = {name: [_to_jpeg(frame) for frame in decode(video)] for name, video in episode.videos.items()}
        rows = np.repeat(np.arange(min(len(episode.poses), *(len(images[camera]) for camera in CAMERAS))), 3)
        longer = {name: getattr(episode, name)[rows] for name in ("poses", "commands", "joint_velocities")}
        made.append(
            to_example(replace(episode, **longer), {name: [all_[row] for row in rows] for name, all_ in images.items()})
        )
    return write_tfds(folder / "1.0.0", droid_features(RLDS_SIZE, extras=False), [made[:5], made[5:]])


def _write_lerobot(folder: Path) -> Path:
    if REAL_GR1.is_dir():
        return REAL_GR1
    return _write_v2(folder, [make_video(400, seed, fps=20, size=(256, 256)) for seed in range(3)])


def _write_v2(folder: Path, videos: Sequence[bytes]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    camera = GR1["camera"]
    write_info(folder, "v2.1", fps=20, features={camera: {"dtype": "video"}})
    lines = []
    for index, video in enumerate(videos):
        data = folder / f"data/chunk-000/episode_{index:06d}.parquet"
        place = folder / f"videos/chunk-000/{camera}/episode_{index:06d}.mp4"
        for path in (data, place):
            path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({**make_rows(index, 400), "timestamp": np.arange(400) / 20}), data)
        place.write_bytes(video)
        lines.append(json.dumps({"episode_index": index, "length": 400}) + "\n")
    (folder / "meta/episodes.jsonl").write_text("".join(lines))
    return folder


def _write_packed(folder: Path) -> Path:
    """The episodes of the v2 data set again and again in one parquet file and one mp4."""
    import av
    import pyarrow as pa
    import pyarrow.parquet as pq

    single, camera = _write_lerobot(folder / "single"), GR1["camera"]
    root = folder / "packed"
    videos = sorted((single / f"videos/chunk-000/{camera}").glob("*.mp4"))
    tables = [pq.read_table(path) for path in sorted((single / "data/chunk-000").glob("*.parquet"))]
    write_info(root, "v3.0", fps=20, features={camera: {"dtype": "video"}})
    data, place = root / "data/chunk-000/file-000.parquet", root / f"videos/{camera}/chunk-000/file-000.mp4"
    for path in (data, place):
        path.parent.mkdir(parents=True, exist_ok=True)
    rows, listed, first = [], [], 0
    with av.open(str(place), "w") as output:
        stream, frame = None, 0
        for index in range(NUM_PACKED):
            table = tables[index % len(tables)]
            with av.open(str(videos[index % len(videos)])) as container:
                given = container.streams.video[0]
                stream = stream or output.add_stream_from_template(given)
                ticks = int(1 / (20 * given.time_base))
                packets = [packet for packet in container.demux(given) if packet.size]
                base = min(packet.pts for packet in packets)
                for packet in packets:
                    packet.pts = packet.pts - base + first * ticks
                    packet.dts = packet.dts - base + first * ticks
                    packet.stream = stream
                    output.mux(packet)
                frame = len(packets)
            place_of = table.schema.names.index("episode_index")
            rows.append(table.set_column(place_of, "episode_index", pa.array([index] * len(table))))
            listed.append(
                {
                    "episode_index": index,
                    "length": len(table),
                    "data/chunk_index": 0,
                    "data/file_index": 0,
                    f"videos/{camera}/chunk_index": 0,
                    f"videos/{camera}/file_index": 0,
                    f"videos/{camera}/from_timestamp": first / 20,
                    f"videos/{camera}/to_timestamp": (first + frame) / 20,
                }
            )
            first += frame
    pq.write_table(pa.concat_tables(rows), data)
    write_list(root, listed)
    return root


def _write_pairs(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for episode in _episodes():
        (folder / f"{episode.name}.mp4").write_bytes(episode.videos["exterior_1"])
        records = {"fps": 5, "actions": episode.commands.tolist(), "states": episode.poses.tolist()}
        (folder / f"{episode.name}.json").write_text(json.dumps(records))
    return folder


def _encode(frames: Sequence[np.ndarray]) -> bytes:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=5, options={"preset": "veryfast"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def _enlarge(frame: np.ndarray) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(frame).resize(RAW_SIZE[::-1]))


def _to_jpeg(frame: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).resize(RLDS_SIZE[::-1]).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()
