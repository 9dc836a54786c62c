"""The synthetic player of the sample recordings: scripted input, and the law by which one tick of input moves it.

Line t of a recording holds the state BEFORE tick t together with the input of tick t, and frame t shows that state, so
`advance` leads from frame t to frame t+1. The law was measured on 64 VPT logs: outside the GUI yaw grows by 0.15 degrees
per pointer count and pitch likewise, clipped to [-90, 90]; inside the GUI both rest and the cursor moves two pixels of
the 1280x720 screen per count.
"""

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field

from jepa_cache.config.schema import Count, RateOrZero, Seed, Settings, Share
from jepa_cache.sample.world import MAP_BLOCKS, World, is_free

FPS_HZ = 20
"""Video frames and control ticks per second; fixed, as in VPT contractor recordings."""

DEG_PER_COUNT = 0.15
SCREEN_CENTRE = (640.0, 360.0)
KEY_PREFIX = "key.keyboard."
GUI_KEY = KEY_PREFIX + "e"

_WALK_BLOCKS_PER_TICK = 0.2158
_SPRINT_FACTOR = 1.3
# Direction of each walking key: (ahead, to the right).
_WALK_KEYS = {"w": (1, 0), "s": (-1, 0), "a": (0, -1), "d": (0, 1)}
# Mostly straight ahead: the 13-D action has no walking keys, so sidesteps would be noise to it.
_GAITS = (("w",), ("w", "left.control"), ("s",), ("a",), ("d",))
_GAIT_SHARES = (0.7, 0.15, 0.05, 0.05, 0.05)
_MEAN_WALK_S = 1.5
_MEAN_CLICK_GAP_S = 5.0
_MEAN_PITCH_DEG = 5.0
_PITCH_RETURN_S = 1.0  # time in which the mean pitch is sought again; keeps the horizon in view


@dataclass(frozen=True)
class SampleConfig(Settings):
    """Settings of one synthetic sample data set; the same settings give the same files on the same machine.

    Shares are fractions of the episodes (quirks) or of the ticks (walking). A quirk falls on exactly
    `round(share * num_episodes)` episodes, chosen by the seed.
    """

    seed: Seed = 0
    num_episodes: Count = 48  # fewer than 36 for training cost held-out error: .499 at 36, .547 at 12
    # Quirks need room: a GUI span and its key presses take up to 3 s of an episode that has one.
    episode_s: Annotated[float, Field(ge=2, le=3600)] = 20.0
    episodes_per_tar: Count = 12
    contrast: Share = 0.3  # of the textures about their mean; low is easier to predict and smaller on disk
    turn_std_deg_per_s: RateOrZero = 100.0  # with the tau below: 15 deg per step at 5 Hz, lag-1 correlation .4
    pitch_std_deg_per_s: RateOrZero = 36.0  # 5 deg per step at 5 Hz
    turn_tau_s: Annotated[float, Field(ge=0.001, le=100)] = 0.12  # correlation time of both turning rates
    walking_share: Share = 0.4  # of the ticks outside the GUI
    stuck_attack_share: Share = 0.95  # 63 of 64 real logs begin with attack held
    wheel_share: Share = 0.25  # episodes in which the mouse wheel moves the hotbar slot
    gui_share: Share = 0.05  # episodes in which the inventory is open for 1 to 2.5 s
    line_mismatch_share: Share = 0.1  # episodes with one line more or fewer than frames, in turn
    crf: Annotated[int, Field(ge=0, le=51)] = 28  # x264 quality: 28 takes half the bytes of 20

    @property
    def num_frames(self) -> int:
        """Video frames per episode, both ends included: 20 s at 20 Hz are 401 frames."""
        return round(self.episode_s * FPS_HZ) + 1


class Quirks(NamedTuple):
    """Faults of real recordings that one episode is given on purpose."""

    stuck_attack: bool  # attack is new on line 0 and held from there until the first true attack click
    wheel: bool  # the wheel changes the hotbar slot, one to three times, without a key
    gui: bool  # the inventory is open for 1 to 2.5 s
    extra_lines: int  # lines minus frames: -1, 0 or 1


class Tick(NamedTuple):
    """Input of one tick, as the player gives it."""

    dx: float = 0.0  # pointer counts, positive to the right; whole numbers outside the GUI
    dy: float = 0.0  # pointer counts, positive downwards
    keys: tuple[str, ...] = ()  # held, as `key.keyboard.*`
    new_keys: tuple[str, ...] = ()  # pressed on this tick
    buttons: tuple[int, ...] = ()  # held: 0 attack, 1 use
    new_buttons: tuple[int, ...] = ()
    wheel: int = 0  # notches; -1 selects the next hotbar slot


class PlayerState(NamedTuple):
    """What a line records of the player before its tick."""

    x_blocks: float = MAP_BLOCKS / 2 + 0.5
    z_blocks: float = MAP_BLOCKS / 2 + 0.5
    yaw_deg: float = 0.0  # unbounded
    pitch_deg: float = 0.0  # positive = down
    mouse_x: float = SCREEN_CENTRE[0]  # GUI: cursor, pixels of 1280x720; else the summed pointer movement
    mouse_y: float = SCREEN_CENTRE[1]
    gui: bool = False
    hotbar: int = 0  # slot 0 to 8


class Script(NamedTuple):
    """Input of a whole episode, with what was put in on purpose."""

    ticks: list[Tick]
    wheel_ticks: list[int]
    gui_span: tuple[int, int] | None  # lines [start, end) on which the GUI is open
    first_attack_tick: int | None  # first true attack click, which ends a stuck attack


def advance(state: PlayerState, tick: Tick, world: World) -> PlayerState:
    """Give the state after one tick; a press of the GUI key shows from the next line on.

    Walking follows the yaw after the tick's turn and stops at blocks, each axis for itself.

    Source: yaw, pitch, cursor and GUI laws measured on 64 VPT logs; walking speed that of Minecraft.
    """
    hotbar = (state.hotbar - tick.wheel) % 9
    toggles = GUI_KEY in tick.new_keys
    scale = 2 if state.gui else 1
    mouse = SCREEN_CENTRE if toggles else (state.mouse_x + scale * tick.dx, state.mouse_y + scale * tick.dy)
    if state.gui:
        return state._replace(mouse_x=mouse[0], mouse_y=mouse[1], gui=not toggles, hotbar=hotbar)
    # Two decimals are exact for multiples of 0.15, so nothing accumulates over an episode.
    yaw = round(state.yaw_deg + DEG_PER_COUNT * tick.dx, 2)
    pitch = round(min(90.0, max(-90.0, state.pitch_deg + DEG_PER_COUNT * tick.dy)), 2)
    x, z = _walk(state.x_blocks, state.z_blocks, yaw, tick.keys, world)
    return PlayerState(x, z, yaw, pitch, mouse[0], mouse[1], toggles, hotbar)


def write_script(rng: np.random.Generator, config: SampleConfig, num_ticks: int, quirks: Quirks) -> Script:
    """Make up one episode's input: restless turning, walking in spells, clicks, and the quirks."""
    dx, dy = _turn(rng, config, num_ticks)
    keys = _walking_keys(rng, config, num_ticks)
    clicks = _clicks(rng, num_ticks)
    span = _open_gui(rng, dx, dy, keys, clicks) if quirks.gui else None
    wheel_ticks = _wheel_ticks(rng, num_ticks, span) if quirks.wheel else []
    notches = {tick: int(rng.choice([-1, 1])) for tick in wheel_ticks}
    first_attack = next((t for t, button in enumerate(clicks) if button == 0), None)
    buttons = [() if button is None else (button,) for button in clicks]
    new_buttons = [now if t == 0 or now != buttons[t - 1] else () for t, now in enumerate(buttons)]
    if quirks.stuck_attack:
        new_buttons[0] = (0,)
        first_new = next((t for t, new in enumerate(new_buttons) if t and 0 in new), num_ticks)
        buttons[:first_new] = [tuple(sorted({0, *held})) for held in buttons[:first_new]]
    ticks = [
        Tick(
            float(dx[t]),
            float(dy[t]),
            keys[t],
            tuple(key for key in keys[t] if t == 0 or key not in keys[t - 1]),
            buttons[t],
            new_buttons[t],
            notches.get(t, 0),
        )
        for t in range(num_ticks)
    ]
    return Script(ticks, wheel_ticks, span, first_attack)


def _walk(x: float, z: float, yaw_deg: float, keys: tuple[str, ...], world: World) -> tuple[float, float]:
    names = [key.removeprefix(KEY_PREFIX) for key in keys]
    pressed = [_WALK_KEYS[name] for name in names if name in _WALK_KEYS]
    ahead, right = sum(p[0] for p in pressed), sum(p[1] for p in pressed)
    if not ahead and not right:
        return x, z
    speed = _WALK_BLOCKS_PER_TICK * (_SPRINT_FACTOR if "left.control" in names else 1) / np.hypot(ahead, right)
    sin, cos = np.sin(np.radians(yaw_deg)), np.cos(np.radians(yaw_deg))
    new_x = float(x + speed * (-sin * ahead - cos * right))
    new_z = float(z + speed * (cos * ahead - sin * right))
    x = new_x if is_free(world, new_x, z) else x
    z = new_z if is_free(world, x, new_z) else z
    return x, z


def _turn(rng: np.random.Generator, config: SampleConfig, num_ticks: int) -> tuple[np.ndarray, np.ndarray]:
    """Pointer counts of two Ornstein-Uhlenbeck turning rates, whole numbers, float64 [num_ticks] each."""
    keep = np.exp(-1 / (FPS_HZ * config.turn_tau_s))
    noise = rng.normal(size=(num_ticks, 2)) * np.sqrt(1 - keep**2)
    std = np.array([config.turn_std_deg_per_s, config.pitch_std_deg_per_s])
    rate, pitch, counts = rng.normal(size=2) * std, 0.0, np.zeros((num_ticks, 2))
    for t in range(num_ticks):
        rate = keep * rate + noise[t] * std
        back = np.array([0.0, (_MEAN_PITCH_DEG - pitch) / _PITCH_RETURN_S])
        counts[t] = np.rint((rate + back) / (FPS_HZ * DEG_PER_COUNT)) + 0.0
        pitch += DEG_PER_COUNT * counts[t, 1]
    return counts[:, 0], counts[:, 1]


def _walking_keys(rng: np.random.Generator, config: SampleConfig, num_ticks: int) -> list[tuple[str, ...]]:
    share = config.walking_share
    keys: list[tuple[str, ...]] = []
    walking = rng.random() < share
    while len(keys) < num_ticks:
        gait = _GAITS[rng.choice(len(_GAITS), p=_GAIT_SHARES)] if walking else ()
        rest_s = _MEAN_WALK_S * (1 - share) / share if share else np.inf
        mean_ticks = FPS_HZ * (_MEAN_WALK_S if walking else rest_s)
        spell = num_ticks if share in (0, 1) else 1 + int(rng.exponential(mean_ticks))
        keys += [tuple(KEY_PREFIX + name for name in gait)] * spell
        walking = (not walking) if 0 < share < 1 else walking
    return keys[:num_ticks]


def _clicks(rng: np.random.Generator, num_ticks: int) -> list[int | None]:
    """Mouse button truly held on each tick, mostly attack."""
    clicks: list[int | None] = [None] * num_ticks
    t = 10 + int(rng.exponential(FPS_HZ * _MEAN_CLICK_GAP_S))
    while t < num_ticks:
        held, button = int(rng.integers(2, 16)), int(rng.random() < 0.2)
        clicks[t : t + held] = [button] * len(clicks[t : t + held])
        t += held + 2 + int(rng.exponential(FPS_HZ * _MEAN_CLICK_GAP_S))
    return clicks


def _open_gui(
    rng: np.random.Generator, dx: np.ndarray, dy: np.ndarray, keys: list[tuple[str, ...]], clicks: list[int | None]
) -> tuple[int, int]:
    """Choose a span, press the GUI key before it and on its last tick; within it stand and move only the cursor."""
    length = int(rng.integers(FPS_HZ, FPS_HZ * 5 // 2 + 1))
    # Short episodes hold a shorter span, with a second of play before it and half a second after.
    length = min(length, len(keys) - FPS_HZ * 3 // 2)
    start = int(rng.integers(FPS_HZ, len(keys) - length - FPS_HZ // 2 + 1))
    end = start + length
    keys[start - 1] = (GUI_KEY, *keys[start - 1])
    keys[start:end] = [()] * (end - start)
    keys[start] = (GUI_KEY,)
    keys[end - 1] = (GUI_KEY,)
    keys[end] = (GUI_KEY, *keys[end])
    clicks[start:end] = [None] * (end - start)
    # Whole-pixel cursor path between random points; counts are half of it, hence the half-integers of real logs.
    knots = np.vstack([SCREEN_CENTRE, rng.integers((300, 150), (980, 570), (3, 2))])
    at = np.linspace(0, 3, end - start)
    path = np.rint(np.stack([np.interp(at, range(4), knots[:, axis]) for axis in (0, 1)], 1))
    dx[start:end], dy[start:end] = 0, 0
    dx[start : end - 1], dy[start : end - 1] = np.diff(path, axis=0).T / 2
    return start, end


def _wheel_ticks(rng: np.random.Generator, num_ticks: int, span: tuple[int, int] | None) -> list[int]:
    """One to three ticks, clear of the GUI and of the end, so that every change shows in the lines."""
    free = [t for t in range(5, num_ticks - 5) if span is None or not span[0] - 1 <= t < span[1]]
    return sorted(int(t) for t in rng.choice(free, size=int(rng.integers(1, 4)), replace=False))
