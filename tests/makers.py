"""Makers of tiny VPT recordings: an mp4, the jsonl of its ticks, and a tar of such pairs. Quick, and the same by seed."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np

REAL_VPT = Path(__file__).resolve().parents[2] / "shared" / "data" / "vpt"
"""Optional folder of real recordings; a test that needs it skips where it is absent."""


def make_video(
    num_frames: int,
    seed: int = 0,
    *,
    fps: int = 20,
    size: tuple[int, int] = (48, 64),
    codec: str = "libx264",
    options: Mapping[str, str] | None = None,
    container: str = "mp4",
) -> bytes:
    """An encoded video of `size` (h, w) in which no two frames are alike: blocks that drift, and a bar that counts."""
    rng = np.random.default_rng(seed)
    height, width = size
    texture = np.kron(rng.integers(40, 216, (height // 8, width // 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=fps, options=dict(options or {"g": "10"}))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.thread_count = 1  # x264's threads change the bits
        for index in range(num_frames):
            image = np.roll(texture, 2 * index, axis=1)
            image[:8, : 1 + index % width] = 255
            output.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def make_rows(num_lines: int, seed: int = 0) -> list[dict[str, Any]]:
    """Lines as a contractor's recorder writes them, without quirks: yaw follows dx, no GUI, slot 0, attack not stuck."""
    rng = np.random.default_rng(seed)
    dx, dy = rng.integers(-60, 61, num_lines), rng.integers(-8, 9, num_lines)
    forward, moving = rng.random(num_lines) < 0.5, rng.random(num_lines) < 0.6
    yaw, pitch, rows = float(rng.integers(-300, 300)), 0.0, []
    for tick in range(num_lines):
        counts = (float(dx[tick]), float(dy[tick])) if moving[tick] else (0.0, 0.0)
        place, wheel = {"x": 640.0, "y": 360.0}, {"scaledX": 0.0, "scaledY": 0.0, "dwheel": 0.0}
        mouse = {**place, "dx": counts[0], "dy": counts[1], **wheel}
        keys = ["key.keyboard.w"] if forward[tick] else []
        rows.append(
            {
                "mouse": {**mouse, "buttons": [], "newButtons": []},
                "keyboard": {"keys": keys, "newKeys": [], "chars": ""},
                "isGuiOpen": False,
                "isGuiInventory": False,
                "hotbar": 0,
                "yaw": yaw,
                "pitch": pitch,
                "xpos": 414.5,
                "ypos": 73.0,
                "zpos": 987.5 + tick,
                "tick": tick,
                "milli": 1650147496543 + 50 * tick,
                "inventory": [],
                "serverTick": tick,
                "serverTickDurationMs": 37.2,
                "stats": {},
            }
        )
        yaw, pitch = yaw + 0.15 * counts[0], float(np.clip(pitch + 0.15 * counts[1], -90, 90))
    return rows


def flip(path: Path, offset: int, bit: int = 2) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def to_jsonl(rows: Sequence[Any]) -> bytes:
    """Rows as a jsonl file."""
    return "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows).encode()


def make_vpt_pair(
    num_frames: int, seed: int = 0, *, num_lines: int | None = None, fps: int = 20, size: tuple[int, int] = (48, 64)
) -> tuple[bytes, bytes]:
    """(mp4, jsonl) of one contractor recording; as many lines as frames unless said otherwise."""
    rows = make_rows(num_frames if num_lines is None else num_lines, seed)
    return make_video(num_frames, seed, fps=fps, size=size), to_jsonl(rows)


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """A plain tar of these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def write_vpt_tar(path: Path, pairs: Mapping[str, tuple[bytes, bytes]]) -> Path:
    """A tar shard of (mp4, jsonl) pairs by segment name."""
    members = []
    for key, (video, lines) in pairs.items():
        members += [(f"{key}.mp4", video), (f"{key}.jsonl", lines)]
    return write_tar(path, members)
