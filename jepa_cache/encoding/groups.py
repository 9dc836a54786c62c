"""Groups of units that share one recipe, with everything that decides the numbers in their stores.

A group is one data set of a mixture, seen by one camera from one starting offset. It is split in two where some units
are read in another way than by the first release, which placed and sampled the frames of every recording as if they
came at one rate, and left streams, turned pictures and unusual pixels to whichever decoder it took. Only units with a
recording for which that matters carry the number of the new way in their recipes; the stores of all others are found
again.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from jepa_cache.actions import VECTOR_RULES, ActionSpace, fit_vector, get_action_space
from jepa_cache.config.paths import default_num_threads
from jepa_cache.config.schema import Config, DatasetPreset, EncodeConfig, EncoderPreset
from jepa_cache.encoder import KINDS, weights_identity
from jepa_cache.encoding.steps import StepPlan, plan_episode, sampling_stride
from jepa_cache.encoding.units import UnitDigester, is_unread, join_units, list_units
from jepa_cache.episode import Episode, Skipped
from jepa_cache.media.images import FrameSequence, SideBySide
from jepa_cache.media.probe import UPRIGHT, VIDEO_SUFFIXES, DecodeError, probe_video
from jepa_cache.media.video import MIN_SEEK_FRAMES
from jepa_cache.sources import Source, Unit, build_source, describe_unreadable, iter_recordings
from jepa_cache.store.digests import DigestTable
from jepa_cache.store.recipe import fingerprint
from jepa_cache.store.root import CacheRoot

NUM_LOOKED_AT = 8
"""Recordings with other columns than an action space's before it is taken to be wrong: by chance at most 0.5^8."""
MAX_EXPECTED_SHARE = 0.5
SCAN_BYTES = 256 << 20
"""What `scan_units` hashes of new and changed files: some tenths of a second. Terabytes are left to stage one."""

READING = 2
"""Raised whenever frames, their times or their pixels change for some recordings only."""

AV1 = ("av1", "libdav1d")  # names of its decoders
SAVE_S = 1.0
CONTAINERS = frozenset((".tar", *(f".{suffix}" for suffix in VIDEO_SUFFIXES)))


class OpenedEncoder(NamedTuple):
    """An encoder preset, the local file or folder of its weights (None for seeded ones), and what identifies them."""

    preset: EncoderPreset
    weights: Path | None
    identity: str


@dataclass(frozen=True)
class EncodingGroup:
    """Units under one recipe, with all that encoding them needs; without units small, for it may travel to a worker."""

    preset: DatasetPreset
    weight: float
    camera: str | None
    phase: int
    units: Sequence[Unit]  # one for each content
    recipe: dict[str, Any]
    action_recipe: dict[str, Any]
    encode: EncodeConfig
    encoder: OpenedEncoder
    num_threads: int  # of torch; another count may change the last bits of tokens that are computed on a CPU
    notes: tuple[str, ...] = ()  # on what was skipped before any recording was read
    copies: Sequence[Unit] = ()  # further units with the content of one in `units`
    unreadable: Sequence[Skipped] = ()  # units of which not every file can be read

    @property
    def source(self) -> Source:
        """What reads its recordings."""
        return open_source(self.preset, self.camera)

    @property
    def space(self) -> ActionSpace:
        """What its actions and states are."""
        return get_action_space(self.action_recipe["action_space"])

    @property
    def view(self) -> str:
        """Camera and phase in words."""
        return ", ".join(filter(None, [self.camera, f"phase {self.phase}" if self.phase else None])) or "main"

    @cached_property
    def fingerprint(self) -> str:
        """Names its token stores."""
        return fingerprint(self.recipe)

    @cached_property
    def action_fingerprint(self) -> str:
        """Names its action stores."""
        return fingerprint(self.action_recipe)

    @cached_property
    def source_fingerprint(self) -> str:
        """Names its controls, for they depend on the source alone."""
        return fingerprint(self.recipe["source"])

    def tokens(self, root: CacheRoot, unit: Unit) -> Path:
        """Where the tokens of a unit lie."""
        return root.tokens(self.fingerprint, unit.digest)

    def actions(self, root: CacheRoot, unit: Unit) -> Path:
        """Where the actions and states of a unit lie."""
        return root.actions(self.action_fingerprint, unit.digest)

    def controls(self, root: CacheRoot, unit: Unit) -> Path:
        """Where the controls of a unit lie."""
        return root.controls(self.source_fingerprint, unit.digest)

    def plan(self, num_frames: int, fps: float, times_s: np.ndarray | None = None) -> StepPlan:
        """Lay out the steps of an episode of so many frames, see `plan_episode`."""
        tubelet_size = self.encoder.preset.tubelet_size
        return plan_episode(num_frames, fps, self.encode, tubelet_size=tubelet_size, phase=self.phase, times_s=times_s)

    def of_units(self, units: Sequence[Unit]) -> EncodingGroup:
        """The same recipe for some of the units alone."""
        return replace(self, units=units, copies=(), unreadable=())


def group_units_by_recipe(
    config: Config,
    encoder: OpenedEncoder,
    inputs: Sequence[str],
    base: Path,
    *,
    budget_bytes: float = math.inf,
    most_bytes: float = math.inf,
) -> list[EncodingGroup]:
    """One group for every data set of a mixture, camera and phase; two where some recordings are read otherwise.

    Of new and changed files at most `budget_bytes` are hashed; `most_bytes` as in `find_readings`.

    Raises:
        ValueError: Positional inputs for a mixture, a camera or option that the source does not know, or no recording.
    """
    check_inputs(config, inputs)
    encode, groups = config.encode, list[EncodingGroup]()
    digest_units, most_units = UnitDigester(budget_bytes), encode.max_units
    for (preset, weight), camera in itertools.product(config.members, encode.cameras or (None,)):
        source = open_source(preset, camera)
        found, notes = join_units(source, list_units(source, preset, inputs, base), encode.episodes_per_unit), ()
        if most_units is not None and len(found) > most_units:
            notes = (
                f"encode.max_units is {most_units}: {len(found) - most_units} of {len(found)} units were not read",
            )
        digested = digest_units(found[:most_units])
        readings = find_readings(source, digested.units, encode.decoder, most_bytes=most_bytes)
        ways = sorted({reading for reading in readings if isinstance(reading, int)}) or [1]
        unreadable = digested.unreadable + [reason for reason in readings if isinstance(reason, Skipped)]
        space = find_space(config, source, digested.units)
        if groups and space.name != groups[0].space.name:
            raise ValueError(
                f"the members of {config.dataset.name} are read together and must have equally many columns; {groups[0].preset.name} has "
                f"{groups[0].space.name}, {preset.name} {space.name}"
            )
        for phase, reading in itertools.product(_phases(config, source, digested.units), ways):
            recipe = name_reading(source.recipe, reading)
            units = [unit for unit, one in zip(digested.units, readings, strict=True) if one == reading]
            digests = {unit.digest for unit in units}
            groups.append(
                EncodingGroup(
                    preset=preset,
                    weight=weight,
                    camera=camera,
                    phase=phase,
                    units=units,
                    recipe=token_recipe(encode, encoder.preset, recipe, encoder.identity, phase=phase),
                    action_recipe=action_recipe(encode, encoder.preset, recipe, space, phase=phase),
                    encode=encode,
                    encoder=encoder,
                    num_threads=default_num_threads(),
                    notes=notes,
                    copies=[copy for copy in digested.copies if copy.digest in digests],
                    # Counted once, whatever the number of ways in which the others are read.
                    unreadable=unreadable if reading == ways[0] else [],
                )
            )
    return groups


def open_source(preset: DatasetPreset, camera: str | None) -> Source:
    """The source of a data set, as one of its cameras sees it; one object for each, since some remember a listing."""
    options = preset.source_options | ({"camera": camera} if camera else {})
    return _open_source(preset.source, json.dumps(options, sort_keys=True))


_open_source = functools.lru_cache(maxsize=8)(lambda name, options: build_source(name, json.loads(options)))


def open_encoder(config: Config, base: Path, *, download: bool = True) -> OpenedEncoder:
    """The encoder that the settings name, with weights that are on this machine afterwards.

    Cost: a download where they are not here, and a digest of a file that is new; minutes for several GB.

    Raises:
        ValueError: Weights that cannot be had, or are not those of the preset.
    """
    preset, weights = config.encoder, None
    if config.encode.weights != preset.weights:
        preset = replace(preset, weights=config.encode.weights, weights_sha256=None, origin=None)
    if preset.weights is not None:
        weights = KINDS[preset.kind].find(preset.weights, base=base, download=download)
        if weights is None:
            return OpenedEncoder(preset, None, f"not on this machine: {preset.weights}")
    return OpenedEncoder(preset, weights, weights_identity(preset, weights, digest=DigestTable().digest))


def scan_units(
    config: Config, inputs: Sequence[str], base: Path, *, most_bytes: float | None = None
) -> tuple[list[EncodingGroup], list[str]]:
    """The groups that stage one would encode, and notes; downloads nothing and reads no recording that is known.

    A unit whose content is not known has a digest that `is_unread`.

    Raises:
        ValueError: As `group_units_by_recipe`; or a weights file that does not exist.
    """
    encoder, notes = open_encoder(config, base, download=False), []
    if encoder.preset.weights is not None and encoder.weights is None:
        notes.append(
            f"the weights {encoder.preset.weights} are not on this machine, so it cannot be known which stores were made with them; "
            "`python stages/encode.py` downloads them, encode.weights=PATH names a file"
        )
    most_bytes = SCAN_BYTES if most_bytes is None else most_bytes
    groups = group_units_by_recipe(config, encoder, inputs, base, budget_bytes=SCAN_BYTES, most_bytes=most_bytes)
    if num_unread := len({unit.digest for group in groups for unit in group.units if is_unread(unit)}):
        notes.append(
            f"{num_unread} units are new or have changed and were not read yet (more than {SCAN_BYTES >> 20} MiB): "
            "`python stages/encode.py` reads them, and finds those again whose content it knows"
        )
    return groups, notes


def find_space(config: Config, source: Source, units: Sequence[Unit]) -> ActionSpace:
    """The action space; one that is named without numbers has the columns of the first recordings.

    Raises:
        ValueError: An unknown name; recordings that have no numbered columns or not equally many, or none that says how many.
    """
    setting = config.encode.action_space
    if setting not in VECTOR_RULES:
        return get_action_space(setting)
    recordings = (recording for unit in units for recording in iter_recordings(source, unit))
    looked_at = list(itertools.islice(recordings, NUM_LOOKED_AT))
    found = {fit_vector(setting, it.controls): it for it in looked_at if isinstance(it, Episode)}
    for name, recording in found.items():
        if name is not None and len(found) == 1:
            return get_action_space(name)
        if name is None:
            held = ", ".join(sorted(recording.controls))
            raise ValueError(
                f"encode.action_space is {setting!r}, but {recording.key} has no numbered actions and states; it holds {held}: choose a space "
                "of these (docs/action_spaces.md)"
            )
    if not found:
        reason = next((f"; {it.key}: {it.reason}" for it in looked_at if isinstance(it, Skipped)), "")
        raise ValueError(
            f"encode.action_space is {setting!r}, and none of the first recordings can be used, so its columns are not known{reason}"
        )
    told = ", ".join(f"{name} in {recording.key}" for name, recording in found.items())
    raise ValueError(
        f"encode.action_space is {setting!r}, but recordings differ in their columns: {told}. Name the one that you want; those of other "
        "columns are skipped then (encode.max_skipped_share)"
    )


def check_controls(group: EncodingGroup) -> None:
    """Refuse, before anything is encoded, an action space that no recording of a sample allows.

    One recording that fits is enough. Does not look where `encode.max_skipped_share` expects most to be skipped.

    Raises:
        ValueError: All those recordings lack columns or hold surplus ones; the spaces that they do allow are named.
    """
    if group.encode.max_skipped_share > MAX_EXPECTED_SHARE:
        return
    misfits = []
    recordings = (recording for unit in group.units for recording in iter_recordings(group.source, unit))
    for recording in itertools.islice(recordings, NUM_LOOKED_AT):
        if isinstance(recording, Episode):
            misfit = group.space.find_misfit(recording.controls)
            if misfit is None:
                return
            misfits.append(misfit)
    if misfits:
        reason, way_out = misfits[0]
        raise ValueError(
            f"action space {group.space.name!r} fits none of the first {len(misfits)} recordings of {group.preset.name}: {reason}; "
            f"{way_out}. Where a few recordings do fit, encode.max_skipped_share=1 skips the others"
        )


def _phases(config: Config, source: Source, units: Sequence[Unit]) -> tuple[int, ...]:
    """The starting offsets; "all" are those below the stride of the first usable recording."""
    if not isinstance(config.encode.phases, str):
        return config.encode.phases
    for recording in (recording for unit in units for recording in iter_recordings(source, unit)):
        if isinstance(recording, Episode):
            return tuple(range(sampling_stride(recording.fps, config.encode.fps)))
    raise ValueError(
        "encode.phases is 'all', but no usable recording says at what rate; see the skipped ones with phases: [0]"
    )


def check_inputs(config: Config, inputs: Sequence[str]) -> None:
    """Refuse positional inputs for a mixture, whose members name their own, with a ValueError."""
    if inputs and len(config.members) > 1:
        raise ValueError(
            f"{config.dataset.name} is a mixture: its members name their own recordings; leave out {inputs[0]!r}"
        )


def find_readings(
    source: Source, units: Sequence[Unit], decoder: str, *, most_bytes: float = math.inf
) -> list[int | Skipped]:
    """1 for each unit that is read as by the first release, `READING` for the others, or why it cannot be read.

    Cost: one pass over the packets and records of a unit, milliseconds a recording; remembered by its digest. Of units
    that were not looked at yet up to `most_bytes` are; the rest is taken for 1.
    """
    recipe = fingerprint({"source": source.recipe, "decoder": decoder, "reading": READING})
    readings, new, saved, table = [], {}, time.monotonic(), DigestTable()
    known = table.recall(f"{recipe}:{unit.digest}" for unit in units)
    for unit in tqdm(units, desc="checking recordings", unit="unit", delay=2):
        key = f"{recipe}:{unit.digest}"
        reading: int | Skipped = int(known.get(key, 1))
        if key not in known and not is_unread(unit) and (most_bytes := most_bytes - unit.num_bytes) >= 0:
            try:
                reading = _find_reading(source, unit, decoder)
                new[key] = str(reading)
            except OSError as error:  # another time it might be read, under what might be the wrong name
                reading = Skipped(unit.name, describe_unreadable(error))
            except ValueError:  # Encoding meets the same error, that of a unit which cannot be read at all.
                reading = 1
        readings.append(reading)
        if new and time.monotonic() - saved > SAVE_S:  # others wait for the table no longer than one write takes
            table.note(new)
            new, saved = {}, time.monotonic()
    table.note(new)
    return readings


def name_reading(source_recipe: Mapping[str, Any], reading: int) -> dict[str, Any]:
    """The recipe of a source with the way of reading in it; 1 leaves it as it was."""
    return dict(source_recipe) if reading == 1 else {**source_recipe, "reading": reading}


def _find_reading(source: Source, unit: Unit, decoder: str) -> int:
    if not any(file.suffix.lower() in CONTAINERS for file in unit.files):
        return 1  # pictures, one for each frame
    with suppress(DecodeError):  # of its content, so that it need not be looked at again
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


# Raised when the same settings would give other tokens or step tables than before.
ENCODE_VERSION = 1


def token_recipe(
    encode: EncodeConfig,
    encoder: EncoderPreset,
    source_recipe: Mapping[str, Any],
    weights_identity: str,
    *,
    phase: int = 0,
) -> dict[str, Any]:
    """Everything that decides the tokens of a store; its hash is the fingerprint.

    Not in it: device, library versions and batch shape (recorded beside the store), the action space, and all of stage
    two.
    """
    return {
        "encode_version": ENCODE_VERSION,
        "encoder": {
            "depth": encoder.depth,
            "embed_dim": encoder.embed_dim,
            "mlp_dim": encoder.mlp_dim,
            "num_heads": encoder.num_heads,
            "patch_size": encoder.patch_size,
            "rope": encoder.rope,
            "tubelet_size": encoder.tubelet_size,
            "weights": weights_identity,
            **KINDS[encoder.kind].recipe_fields(encoder, encode),
        },
        "preprocess": {
            "crop": encoder.crop,
            "mean": list(encoder.mean),
            "resolution": encoder.resolution,
            "std": list(encoder.std),
            **({} if encoder.short_side is None else {"short_side": encoder.short_side}),
        },
        "sampling": sampling_recipe(encode, phase),
        "compute_dtype": encode.compute_dtype,
        "dtype": encode.dtype,
        "decoder": encode.decoder,
        "source": dict(source_recipe),
        # Absent where off, as in recipes from before them.
        **({} if encode.pool == 1 else {"pool": encode.pool}),
        **({"compile": True} if encode.compile else {}),
    }


def sampling_recipe(encode: EncodeConfig, phase: int) -> dict[str, Any]:
    """Which moments of a recording become steps."""
    return {
        "fps": encode.fps,
        "frames_per_clip": encode.frames_per_clip if encode.mode == "clip" else None,
        "mode": encode.mode,
        "phase": phase,
        "view": "main",
    }


def action_recipe(
    encode: EncodeConfig,
    encoder: EncoderPreset,
    source_recipe: Mapping[str, Any],
    space: ActionSpace,
    *,
    phase: int = 0,
) -> dict[str, Any]:
    """Everything that decides actions and states: no weights, no pixels."""
    return {
        "action_space": space.name,
        "action_version": space.version,
        "sampling": {**sampling_recipe(encode, phase), "tubelet_size": encoder.tubelet_size},
        "source": dict(source_recipe),
    }
