"""Which units hold recordings that are read in another way than by the first release, so that their stores have other names.

The first release placed and sampled the frames of every recording as if they came at one rate, and left streams, turned pictures and
unusual pixels to whichever decoder it took. Only units with a recording for which that matters carry the number of the new
way in their recipes; the stores of all others are found again.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jepa_cache.config.machine import state_folder
from jepa_cache.episode import Episode
from jepa_cache.media.images import FrameSequence, SideBySide
from jepa_cache.media.probe import UPRIGHT, VIDEO_SUFFIXES, probe_video
from jepa_cache.media.video import MIN_SEEK_FRAMES
from jepa_cache.sources import Source, Unit
from jepa_cache.store.recipe import fingerprint

READING = 2
"""Raised whenever frames, their times or their pixels change for some recordings only."""

AV1 = ("av1", "libdav1d")  # names of its decoders
SAVE_S = 1.0
CONTAINERS = frozenset((".tar", *(f".{suffix}" for suffix in VIDEO_SUFFIXES)))


def find_readings(
    source: Source, units: Sequence[tuple[Unit, str]], decoder: str, *, most_bytes: float = float("inf")
) -> list[int]:
    """1 for each unit that is read as by the first release, `READING` for the others.

    Cost: the first time one pass over the packets and records of a unit, milliseconds a recording; remembered by its digest in
    the state folder. Of units that were not looked at yet up to `most_bytes` are; the rest is taken for 1.
    """
    recipe = fingerprint({"source": source.recipe, "decoder": decoder, "reading": READING})
    readings, new, saved = [], [], time.monotonic()
    with closing(_connect()) as connection:
        for unit, digest in tqdm(units, desc="checking recordings", unit="unit", delay=2):
            key = f"{recipe}:{digest}"
            row = connection.execute("SELECT reading FROM readings WHERE unit = ?", (key,)).fetchone()
            reading = row[0] if row else 1
            if row is None and (most_bytes := most_bytes - unit.num_bytes) >= 0:
                with suppress(
                    ValueError, OSError
                ):  # Encoding meets the same error, that of a unit which cannot be read at all.
                    reading = _find_reading(source, unit, decoder)
                    new.append((key, reading))
            readings.append(reading)
            if new and (len(readings) == len(units) or time.monotonic() - saved > SAVE_S):
                with (
                    connection
                ):  # The disk is waited for once a second, and others wait for the table no longer than that.
                    connection.executemany("INSERT OR REPLACE INTO readings VALUES (?, ?)", new)
                new, saved = [], time.monotonic()
    return readings


def name_reading(source_recipe: Mapping[str, Any], reading: int) -> dict[str, Any]:
    """The recipe of a source with the way of reading in it; 1 leaves it as it was."""
    return dict(source_recipe) if reading == 1 else {**source_recipe, "reading": reading}


def _find_reading(source: Source, unit: Unit, decoder: str) -> int:
    if not any(file.suffix.lower() in CONTAINERS for file in unit.files):
        return 1  # pictures, one for each frame
    for recording in source.iter_episodes(unit):
        if isinstance(recording, Episode) and _reads_otherwise(recording, decoder):
            return READING
    return 1


def _reads_otherwise(episode: Episode, decoder: str) -> bool:
    if isinstance(episode.video, FrameSequence):
        return False
    info = probe_video(episode.video.video if isinstance(episode.video, SideBySide) else episode.video)
    # Where the first release took decord: its other pixels are those of PyAV now.
    by_decord = (
        decoder == "auto" and episode.first_frame < MIN_SEEK_FRAMES and not info.open_gop and info.codec not in AV1
    )
    return (
        episode.frame_times_s is not None
        or info.stream > 0
        or info.orientation != UPRIGHT
        or (by_decord and info.decord_fault != "")
    )


def _connect() -> sqlite3.Connection:
    path: Path = state_folder() / "readings.sqlite"
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=60)
    connection.execute("CREATE TABLE IF NOT EXISTS readings (unit TEXT PRIMARY KEY, reading INTEGER NOT NULL)")
    return connection
