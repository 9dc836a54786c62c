"""Writes one synthetic episode in the form of a VPT contractor recording: an h264 mp4 and one JSON line per tick."""

import io
import json
from collections.abc import Iterable

import av
import numpy as np

from jepa_cache.sample.config import FPS_HZ
from jepa_cache.sample.player import KEY_PREFIX, SCREEN_CENTRE, PlayerState, Tick

VIDEO_HEIGHT, VIDEO_WIDTH = 360, 640

_GROUND_Y_BLOCKS = 64.0
# What a limited-range video adds to Y, U and V.
_YUV_OFFSETS = np.array([16, 128, 128], np.float32).reshape(3, 1, 1)


def encode_video(pictures: Iterable[np.ndarray], crf: int) -> bytes:
    """Encode pictures as a 640x360 h264 mp4 at 20 fps, every pixel repeated four times both ways.

    Args:
        pictures: planes of `world.render`, float32 [3, 90, 160] each.
        crf: x264 quality, 0 to 51.

    Returns:
        The mp4 file; the same bytes for the same pictures and library versions.
    """
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        # One thread: x264's threads change the bits, and the workers share the cores anyway.
        options = {"preset": "ultrafast", "crf": str(crf), "g": "60", "threads": "1"}
        stream = container.add_stream("libx264", rate=FPS_HZ, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = VIDEO_WIDTH, VIDEO_HEIGHT, "yuv420p", 1
        for picture in pictures:
            container.mux(stream.encode(_to_frame(picture)))
        container.mux(stream.encode(None))
    return out.getvalue()


def dim_for_gui(picture: np.ndarray) -> np.ndarray:
    """Show an open inventory: the view goes dark behind a grey panel with slots; no cursor, as in real recordings.

    Args:
        picture: planes of `world.render`, float32 [3, 90, 160]; not changed.
    """
    picture = picture * np.float32(0.4)
    picture[1:, 16:74, 46:114] = 0
    panel = picture[0, 16:74, 46:114]
    panel[:] = 170
    for top in (30, 38, 46):
        for left in range(2, 62, 7):
            panel[top : top + 6, left : left + 6] = 119
    return picture


def write_lines(states: list[PlayerState], ticks: list[Tick], num_lines: int, start_milli: int) -> bytes:
    """Write the jsonl: line t holds the state before tick t and the input of tick t, in the key order of real files.

    Args:
        states: at least `num_lines`, before each tick.
        ticks: at least `num_lines`.
        num_lines: lines to write.
        start_milli: wall clock of line 0, ms.
    """
    lines, walked_cm = [], 0.0
    for t in range(num_lines):
        if t:
            moved = np.subtract(states[t][:2], states[t - 1][:2])
            walked_cm += 100 * float(np.hypot(*moved))
        line = _line(t, states[t], ticks[t], start_milli, walked_cm)
        lines.append(json.dumps(line, separators=(",", ":")) + "\n")
    return "".join(lines).encode()


def _line(t: int, state: PlayerState, tick: Tick, start_milli: int, walked_cm: float) -> dict[str, object]:
    scale = 0.5 if state.gui else 1.0
    return {
        "mouse": {
            "x": state.mouse_x,
            "y": state.mouse_y,
            "dx": tick.dx,
            "dy": tick.dy,
            "scaledX": (state.mouse_x - SCREEN_CENTRE[0]) * scale,
            "scaledY": (state.mouse_y - SCREEN_CENTRE[1]) * scale,
            "dwheel": float(tick.wheel),
            "buttons": list(tick.buttons),
            "newButtons": list(tick.new_buttons),
        },
        "keyboard": {"keys": list(tick.keys), "newKeys": list(tick.new_keys), "chars": _typed(tick.new_keys)},
        "isGuiOpen": state.gui,
        "isGuiInventory": state.gui,
        "hotbar": state.hotbar,
        "yaw": state.yaw_deg,
        "pitch": state.pitch_deg,
        "xpos": state.x_blocks,
        "ypos": _GROUND_Y_BLOCKS,
        "zpos": state.z_blocks,
        "tick": t,
        "milli": start_milli + t * 1000 // FPS_HZ,
        "inventory": [],
        "serverTick": t + 2,
        "serverTickDurationMs": 12.5,
        "stats": {
            "minecraft.custom:minecraft.time_since_rest": t + 1,
            "minecraft.custom:minecraft.play_one_minute": t + 1,
            "minecraft.custom:minecraft.time_since_death": t + 1,
            "minecraft.custom:minecraft.walk_one_cm": int(walked_cm),
        },
    }


def _typed(new_keys: tuple[str, ...]) -> str:
    return "".join(name for name in (key.removeprefix(KEY_PREFIX) for key in new_keys) if len(name) == 1)


def _to_frame(picture: np.ndarray) -> av.VideoFrame:
    """Fill a frame: luma repeated four times both ways, chroma twice, as it is half as wide and high in yuv420p."""
    frame = av.VideoFrame(VIDEO_WIDTH, VIDEO_HEIGHT, "yuv420p")
    planes = np.clip(np.rint(picture + _YUV_OFFSETS), 0, 255).astype(np.uint8)
    for plane, target in zip(planes, frame.planes, strict=True):
        times = target.height // plane.shape[0]
        pixels = np.frombuffer(target, np.uint8).reshape(target.height, target.line_size)
        # Rows may be padded; widened once, each is copied whole.
        wide = plane.repeat(times, axis=1)
        pixels.reshape(-1, times, target.line_size)[:, :, : wide.shape[1]] = wide[:, None]
    return frame
