"""Records one synthetic episode in the form of a VPT contractor recording: an h264 mp4 and one JSON line per tick."""

import io
import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import av
import numpy as np

from jepa_cache.sample.player import (
    FPS_HZ,
    KEY_PREFIX,
    SCREEN_CENTRE,
    PlayerState,
    Quirks,
    SampleConfig,
    Tick,
    advance,
    write_script,
)
from jepa_cache.sample.world import Scenery, World, build_scenery, build_world, render

VIDEO_HEIGHT, VIDEO_WIDTH = 360, 640

_GROUND_Y_BLOCKS = 64.0
# What a limited-range video adds to Y, U and V.
_YUV_OFFSETS = np.array([16, 128, 128], np.float32).reshape(3, 1, 1)

_COLOURS = ("amber", "cobalt", "crimson", "ivory", "jade", "ochre", "teal", "violet")
_ANIMALS = ("badger", "heron", "ibex", "lynx", "marten", "otter", "plover", "vole")
# Streams of random numbers, so that a change in one leaves the others as they were.
_SCENERY, _QUIRKS, _WORLD, _SCRIPT, _NAME = range(5)


class Recording(NamedTuple):
    """One finished episode: files as they go into the tar shard, and what is true of them."""

    key: str
    video: bytes
    lines: bytes
    truth: dict[str, object]


def plan_quirks(config: SampleConfig) -> list[Quirks]:
    """Deal the quirks to the episodes: each on exactly its share of them, chosen by the seed."""
    rng = np.random.default_rng([config.seed, _QUIRKS])
    shares = (config.stuck_attack_share, config.wheel_share, config.gui_share, config.line_mismatch_share)
    # Place of every episode in a random order of its own per quirk; the first ones get the quirk.
    places = [rng.permutation(config.num_episodes) for _ in shares]
    stuck, wheel, gui, mismatch = (
        place < round(share * config.num_episodes) for place, share in zip(places, shares, strict=True)
    )
    extra_lines = np.where(mismatch, np.where(places[3] % 2 == 0, 1, -1), 0)
    return [Quirks(*values) for values in zip(*(it.tolist() for it in (stuck, wheel, gui, extra_lines)), strict=True)]


def record_episode(config: SampleConfig, index: int) -> Recording:
    """Play, render and write one episode; a pure function of the settings and the episode's number.

    Cost: 4 to 5.5 ms of CPU time per frame (a busy 2-core machine), about 2 s for the default 401 frames.
    """
    quirks = plan_quirks(config)[index]
    world = build_world(_rng(config, _WORLD, index))
    scenery = build_scenery(_rng(config, _SCENERY, 0), config.contrast)
    num_frames, num_lines = config.num_frames, config.num_frames + quirks.extra_lines
    script = write_script(_rng(config, _SCRIPT, index), config, num_frames + 1, quirks)
    states = [PlayerState()]  # before every tick
    for tick in script.ticks:
        states.append(advance(states[-1], tick, world))
    start = datetime(2025, 1, 1, 8, tzinfo=UTC) + timedelta(seconds=index * (int(config.episode_s) + 5))
    # A segment name in the contractors' form, with an alias that says what it is; the time makes it unique.
    rng = _rng(config, _NAME, index)
    alias = f"synthetic-{rng.choice(_COLOURS)}-{rng.choice(_ANIMALS)}"
    key = f"{alias}-{rng.bytes(6).hex()}-{start:%Y%m%d-%H%M%S}"
    truth = {
        "key": key,
        "num_frames": num_frames,
        "num_lines": num_lines,
        "extra_lines": quirks.extra_lines,
        "stuck_attack": quirks.stuck_attack,
        "first_attack_tick": script.first_attack_tick,
        "wheel_ticks": script.wheel_ticks,
        "gui_span": script.gui_span,
    }
    frames = (_to_frame(_show(state, world, scenery)) for state in states[:num_frames])
    video = encode_video(frames, VIDEO_WIDTH, VIDEO_HEIGHT, FPS_HZ, preset="ultrafast", crf=str(config.crf), g="60")
    lines = _write_lines(states, script.ticks, num_lines, int(start.timestamp() * 1000))
    return Recording(key, video, lines, truth)


def _rng(config: SampleConfig, stream: int, index: int) -> np.random.Generator:
    return np.random.default_rng([config.seed, stream, index])


def encode_video(frames: Iterable[av.VideoFrame], width: int, height: int, fps_hz: int, **options: str) -> bytes:
    """Encode frames as an h264 mp4; the options are x264's."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        # One thread: x264's threads change the bits, and the workers share the cores anyway.
        stream = container.add_stream("libx264", rate=fps_hz, options=options | {"threads": "1"})
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = width, height, "yuv420p", 1
        for frame in frames:
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


def _show(state: PlayerState, world: World, scenery: Scenery) -> np.ndarray:
    """What the player sees, as `render`: an open inventory darkens the view behind a grey panel with slots, without a cursor."""
    picture = render(world, scenery, state.x_blocks, state.z_blocks, state.yaw_deg, state.pitch_deg)
    if not state.gui:
        return picture
    picture *= np.float32(0.4)
    picture[1:, 16:74, 46:114] = 0
    panel = picture[0, 16:74, 46:114]
    panel[:] = 170
    for top in (30, 38, 46):
        for left in range(2, 62, 7):
            panel[top : top + 6, left : left + 6] = 119
    return picture


def _write_lines(states: list[PlayerState], ticks: list[Tick], num_lines: int, start_milli: int) -> bytes:
    """Write the jsonl: line t holds the state before tick t and the input of tick t, in the key order of real files."""
    lines, walked_cm = [], 0.0
    for t in range(num_lines):
        if t:
            moved = np.subtract(states[t][:2], states[t - 1][:2])
            walked_cm += 100 * float(np.hypot(*moved))
        line = _line(t, states[t], ticks[t], start_milli + t * 1000 // FPS_HZ, int(walked_cm))
        lines.append(json.dumps(line, separators=(",", ":")) + "\n")
    return "".join(lines).encode()


def _line(t: int, state: PlayerState, tick: Tick, milli: int, walked_cm: int) -> dict[str, object]:
    scale = 0.5 if state.gui else 1.0
    names = [key.removeprefix(KEY_PREFIX) for key in tick.new_keys]
    times = ("time_since_rest", "play_one_minute", "time_since_death")
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
        "keyboard": {
            "keys": list(tick.keys),
            "newKeys": list(tick.new_keys),
            "chars": "".join(name for name in names if len(name) == 1),
        },
        "isGuiOpen": state.gui,
        "isGuiInventory": state.gui,
        "hotbar": state.hotbar,
        "yaw": state.yaw_deg,
        "pitch": state.pitch_deg,
        "xpos": state.x_blocks,
        "ypos": _GROUND_Y_BLOCKS,
        "zpos": state.z_blocks,
        "tick": t,
        "milli": milli,
        "inventory": [],
        "serverTick": t + 2,
        "serverTickDurationMs": 12.5,
        "stats": {
            **{f"minecraft.custom:minecraft.{name}": t + 1 for name in times},
            "minecraft.custom:minecraft.walk_one_cm": walked_cm,
        },
    }


def _to_frame(picture: np.ndarray) -> av.VideoFrame:
    """Fill a 640x360 frame: luma repeated four times both ways, chroma twice, as it is half as wide and high in yuv420p."""
    frame = av.VideoFrame(VIDEO_WIDTH, VIDEO_HEIGHT, "yuv420p")
    planes = np.clip(np.rint(picture + _YUV_OFFSETS), 0, 255).astype(np.uint8)
    for plane, target in zip(planes, frame.planes, strict=True):
        times = target.height // plane.shape[0]
        pixels = np.frombuffer(target, np.uint8).reshape(target.height, target.line_size)
        # Rows may be padded; widened once, each is copied whole.
        wide = plane.repeat(times, axis=1)
        pixels.reshape(-1, times, target.line_size)[:, :, : wide.shape[1]] = wide[:, None]
    return frame
