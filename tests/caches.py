"""Maker of a tiny cached data set, written with the store's own writers: no video, no encoder, and actions that move the tokens.

Each episode turns its view at random; the tokens of a step are waves of its yaw. So a predictor that sees the actions can know
the next step, and one that does not can only copy. In spaces of poses the yaw is the place x, a metre every 1,000 degrees, and all
else stands still; in spaces of vectors state_0 is the yaw, action_0 its change (`sum`) or where it will be (`last`; its
waves are five times as long, so that no two places look alike), and any further column stands still.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from jepa_cache.actions import VPT_BUTTONS, ActionSpace, get_action_space
from jepa_cache.config.loading import load_config
from jepa_cache.config.schema import Config
from jepa_cache.data.dataset import CachedDataset
from jepa_cache.data.scaler import Scaler, fit_scaler, write_scaler
from jepa_cache.store import layout
from jepa_cache.store.controls import write_actions
from jepa_cache.store.layout import read_store_file
from jepa_cache.store.manifest import Manifest, ManifestEntry, ManifestPart, write_manifest
from jepa_cache.store.recipe import fingerprint
from jepa_cache.store.root import CacheRoot
from jepa_cache.store.writer import TokenWriter, table
from tests.makers import make_vpt_pair, write_vpt_tar
from tests.workspace import SUITE_SETTINGS

GRID, WIDTH = (2, 2), 8
TICKS_PER_STEP = 4

# Small and quick; five of the eight episodes train, three are held out.
OVERRIDES = (
    *(
        "split.val_share=0.3",
        "split.seed=2",
        "train.num_steps=12",
        "train.window_steps=5",
        "train.batch_size=4",
        "train.num_warmup=2",
    ),
    *("train.num_anneal=4", "train.lr=0.003", "train.start_lr=0.001", "train.log_every=2", "train.validate_every=6"),
    *("train.checkpoint_every=4", "train.device=cpu", "train.num_threads=1", "evaluate.num_context_steps=2"),
    *("evaluate.horizon=4", "evaluate.windows_per_episode=5", "evaluate.num_bootstrap=200", "evaluate.batch_size=4"),
    "evaluate.measure=[]",
)


# Of predictors of every kind.
SMALL = {"predictor_dim": 16, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0, "num_components": 6, "num_products": 4}


@contextmanager
def no_pictures() -> Iterator[None]:
    """Evaluations draw nothing, which takes most of their time: test_pictures.py, test_cameras.py and test_pipeline.py let them draw."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_horizon", "write_films", "write_page"):
            patch.setattr(f"jepa_cache.evaluation.run.{name}", lambda *_, **__: None)
        yield


class Cache(NamedTuple):
    """A workspace: outputs/encode/manifest.json and outputs/scaler/scaler.json under `folder`, the stores under `root`."""

    folder: Path
    root: CacheRoot
    config: Config
    dataset: CachedDataset
    scaler: Scaler


def make_config(*overrides: str) -> Config:
    """The released settings, made small, with a predictor of two thousand weights."""
    config = load_config(SUITE_SETTINGS, [*OVERRIDES, *overrides])
    small = {name: value for name, value in SMALL.items() if hasattr(config.predictor, name)}
    return replace(config, predictor=replace(config.predictor, **small))


def make_cache(
    folder: Path,
    *overrides: str,
    seed: int = 0,
    num_steps: int = 30,
    encoder_trained: bool = False,
    units: Mapping[str, Sequence[str]] | None = None,
    dtype: str = "float16",
) -> Cache:
    """Write and open a cached data set.

    Args:
        folder: Of the workspace; the stores lie in `folder/cache`.
        overrides: `key=value` settings on top of `OVERRIDES`.
        seed: Of the movements; another seed is another recipe.
        num_steps: Of every episode.
        encoder_trained: What the manifest claims.
        units: sha256 of each unit to the keys of its episodes; default two units of four.
        dtype: That the tokens are stored as.
    """
    config, root = make_config(f"encode.dtype={dtype}", *overrides), CacheRoot(folder / "cache")
    space = get_action_space(config.encode.action_space)
    if units is None:
        keys = [f"episode-{number}" for number in range(8)]
        units = {
            hashlib.sha256(name.encode()).hexdigest(): keys[part]
            for name, part in (("a", slice(4)), ("b", slice(4, 8)))
        }
    sampling = {"fps": config.encode.fps, "mode": config.encode.mode}
    encoder = {"weights": f"made:{seed}"}
    recipe: dict[str, Any] = {
        "made by": "tests/caches.py",
        "source": {"source": config.dataset.source, **config.dataset.source_options},
        "encoder": encoder,
        "sampling": sampling,
        "compute_dtype": "float32",
        "dtype": dtype,
        "decoder": "auto",
    }
    action_recipe = {"action_space": space.name, "sampling": sampling}
    rng, entries = np.random.default_rng(seed), []
    for digest, episodes in sorted(units.items()):
        tokens, actions, states = [], [], []
        for _ in episodes:
            controls = as_recorded_in(space, make_controls(num_steps, rng))
            result = space.aggregate(controls, np.arange(num_steps) * TICKS_PER_STEP)
            scale = 1000.0 if "x_m" in space.required else 0.2 if "last" in space.name else 1.0
            tokens.append(make_tokens(result.states[:, 0] * scale))
            actions.append(np.vstack([result.actions, np.full(result.actions.shape[1], np.nan)]))
            states.append(result.states)
        entries.append(_write_unit(root, recipe, action_recipe, digest, episodes, tokens, actions, states))
    part = ManifestPart(
        dataset=config.dataset.name,
        weight=1.0,
        camera=None,
        phase=0,
        fingerprint=fingerprint(recipe),
        recipe=recipe,
        action_fingerprint=fingerprint(action_recipe),
        action_recipe=action_recipe,
        source_fingerprint="0" * 32,
        skipped=(),
        notes=(),
        entries=tuple(entries),
    )
    manifest = Manifest(
        dataset=config.dataset.name,
        num_tokens=GRID[0] * GRID[1],
        width=WIDTH,
        grid=GRID,
        mode=config.encode.mode,
        encoder=config.encoder.name,
        encoder_trained=encoder_trained,
        comparable=True,
        action_space=space.name,
        parts=(part,),
    )
    write_manifest(manifest, [folder / "outputs/encode/manifest.json"])
    dataset = CachedDataset(manifest, root)
    scaler = fit_scaler(dataset, dataset.segments_of("train", config.split), config.scaler)
    write_scaler(scaler, folder / "outputs/scaler/scaler.json")
    return Cache(folder, root, config, dataset, scaler)


def make_recorded(folder: Path, num_episodes: int) -> tuple[Cache, Path, dict[str, bytes]]:
    """A cache of 12 steps an episode whose one unit is a tar shard of videos, the shard, and the videos by key."""
    pairs = {f"episode-{number}": make_vpt_pair(12 * TICKS_PER_STEP, seed=number) for number in range(num_episodes)}
    tar = write_vpt_tar(folder / "shards/a.tar", pairs)
    cache = make_cache(folder, units={hashlib.sha256(tar.read_bytes()).hexdigest(): list(pairs)}, num_steps=12)
    return cache, tar, {key: video for key, (video, _) in pairs.items()}


def make_controls(num_steps: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Native-rate controls of one episode: the mouse turns the view by 0.15 degrees a count, another slot every few steps."""
    num_ticks = num_steps * TICKS_PER_STEP
    turn = np.repeat(rng.integers(-60, 61, num_steps), TICKS_PER_STEP).astype(np.float64)
    pitch = rng.integers(-3, 4, num_ticks).astype(np.float64)
    controls: dict[str, np.ndarray] = {name: np.zeros(num_ticks, bool) for name in VPT_BUTTONS}
    before = lambda counts: 0.15 * (np.cumsum(counts) - counts)  # noqa: E731
    return controls | {
        "mouse_dx": turn,
        "mouse_dy": pitch,
        "yaw_deg": rng.uniform(-180, 180) + before(turn),
        "pitch_deg": before(pitch),
        "hotbar": np.repeat(rng.integers(0, 9, num_steps), TICKS_PER_STEP).astype(np.int8),
    }


def as_recorded_in(space: ActionSpace, controls: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same movements with the columns that a space of poses or vectors reads."""
    if space.name.startswith("vpt"):
        return controls
    yaw, still = controls["yaw_deg"], np.full(len(controls["yaw_deg"]), 0.25)
    if "x_m" in space.required:
        return dict.fromkeys(space.required, still) | {"x_m": yaw / 1000, "ext_y_m": np.cumsum(still)}
    turn = 0.15 * controls["mouse_dx"]
    moves = turn if "sum" in space.name else yaw + turn
    return dict.fromkeys(space.required, still) | {"action_0": moves, "state_0": yaw}


def make_tokens(yaw_deg: np.ndarray) -> np.ndarray:
    """[T, N, D] float16 waves of the yaw, of other frequency per channel and phase per token."""
    token, channel = np.meshgrid(np.arange(GRID[0] * GRID[1]), np.arange(WIDTH), indexing="ij")
    angle = np.radians(yaw_deg)[:, None, None] * (1 + channel % 2) + 0.8 * token + 1.7 * channel
    return (2 * np.sin(angle)).astype(np.float16)


def _write_unit(
    root: CacheRoot,
    recipe: dict[str, Any],
    action_recipe: dict[str, Any],
    digest: str,
    episodes: Sequence[str],
    tokens: Sequence[np.ndarray],
    actions: Sequence[np.ndarray],
    states: Sequence[np.ndarray],
) -> ManifestEntry:
    stores = root.tokens(fingerprint(recipe), digest), root.actions(fingerprint(action_recipe), digest)
    per_episode, num_steps = len(tokens[0]), sum(len(part) for part in tokens)
    steps = {field.name: np.zeros(num_steps) for field in layout.STEPS_SCHEMA}
    steps["gui"] = np.zeros(num_steps, bool)
    steps["luma_mean"] = np.concatenate([part.astype(np.float32).mean(axis=(1, 2)) for part in tokens])
    steps["segment"] = np.repeat(np.arange(len(episodes)), per_episode)
    steps["frame"] = steps["tick"] = np.tile(np.arange(per_episode) * TICKS_PER_STEP, len(episodes))
    starts = np.arange(len(episodes)) * per_episode
    segments = {
        "segment": np.arange(len(episodes)),
        "episode": list(episodes),
        "start": starts,
        "stop": starts + per_episode,
        "step_hz": np.full(len(episodes), 5.0),
    }
    card = {"recipe": recipe, "num_segments": len(episodes), "num_episodes": len(episodes), "skipped": [], "notes": []}
    dtype = recipe["dtype"]
    with TokenWriter(stores[0], num_tokens=GRID[0] * GRID[1], width=WIDTH, dtype=dtype) as writer:
        for part in tokens:
            writer.append(
                part if dtype != "bfloat16" else (part.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
            )
        writer.publish(table(layout.STEPS_SCHEMA, steps), table(layout.SEGMENTS_SCHEMA, segments), card, {})
    write_actions(
        stores[1],
        np.concatenate(actions).astype(np.float32),
        np.concatenate(states).astype(np.float32),
        {"excluded": {}, "num_steps": num_steps},
    )
    tokens_digest, actions_digest = (read_store_file(store).digest for store in stores)
    return ManifestEntry(digest, tokens_digest, actions_digest, num_steps, len(episodes), len(episodes))
