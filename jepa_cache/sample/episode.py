"""Records one synthetic episode: its quirks, its world, its input, its pictures and its name."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import numpy as np

from jepa_cache.sample.config import SampleConfig
from jepa_cache.sample.player import play, write_script
from jepa_cache.sample.recording import dim_for_gui, encode_video, write_lines
from jepa_cache.sample.scenery import build_scenery
from jepa_cache.sample.world import build_world, render

_COLOURS = ("amber", "cobalt", "crimson", "ivory", "jade", "ochre", "teal", "violet")
_ANIMALS = ("badger", "heron", "ibex", "lynx", "marten", "otter", "plover", "vole")
# Streams of random numbers, so that a change in one leaves the others as they were.
_SCENERY, _QUIRKS, _WORLD, _SCRIPT, _NAME = range(5)


class Quirks(NamedTuple):
    """Faults of real recordings that one episode is given on purpose."""

    stuck_attack: bool
    wheel: bool
    gui: bool
    extra_lines: int  # lines minus frames: -1, 0 or 1


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
    return [
        Quirks(bool(s), bool(w), bool(g), int(e)) for s, w, g, e in zip(stuck, wheel, gui, extra_lines, strict=True)
    ]


def record_episode(config: SampleConfig, index: int) -> Recording:
    """Play, render and write one episode; a pure function of the settings and the episode's number.

    Cost: 4 to 5.5 ms of CPU time per frame (a busy 2-core machine), about 2 s for the default 401 frames.
    """
    quirks = plan_quirks(config)[index]
    world = build_world(_rng(config, _WORLD, index))
    num_frames, num_lines = config.num_frames, config.num_frames + quirks.extra_lines
    script = write_script(
        _rng(config, _SCRIPT, index),
        config,
        num_frames + 1,
        stuck_attack=quirks.stuck_attack,
        wheel=quirks.wheel,
        gui=quirks.gui,
    )
    states = play(script.ticks, world)
    scenery = build_scenery(_rng(config, _SCENERY, 0), config.contrast)

    def pictures() -> Iterator[np.ndarray]:
        for state in states[:num_frames]:
            picture = render(world, scenery, state.x_blocks, state.z_blocks, state.yaw_deg, state.pitch_deg)
            yield dim_for_gui(picture) if state.gui else picture

    start = datetime(2025, 1, 1, 8, tzinfo=UTC) + timedelta(seconds=index * (int(config.episode_s) + 5))
    key = _name(_rng(config, _NAME, index), start)
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
    lines = write_lines(states, script.ticks, num_lines, int(start.timestamp() * 1000))
    return Recording(key, encode_video(pictures(), config.crf), lines, truth)


def _name(rng: np.random.Generator, start: datetime) -> str:
    """Segment name in the contractors' form, with an alias that says what it is; the time makes it unique."""
    alias = f"synthetic-{rng.choice(_COLOURS)}-{rng.choice(_ANIMALS)}"
    return f"{alias}-{rng.bytes(6).hex()}-{start:%Y%m%d-%H%M%S}"


def _rng(config: SampleConfig, stream: int, index: int) -> np.random.Generator:
    return np.random.default_rng([config.seed, stream, index])
