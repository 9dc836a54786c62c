"""Fills the missing stores of one part: the same in the plain run and in a Dask worker."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jepa_cache.actions import ActionSpace
from jepa_cache.config.schema import EncodeConfig, EncoderPreset
from jepa_cache.encoder.weights import weights_files, weights_identity
from jepa_cache.encoding.aggregation import is_current, write_unit_actions
from jepa_cache.encoding.claims import Claims, is_whole, remove_damaged
from jepa_cache.encoding.decoding import DecodeSettings
from jepa_cache.encoding.parts import Part
from jepa_cache.encoding.pipeline import Timing, encode_units
from jepa_cache.encoding.units import check_unchanged
from jepa_cache.episode import Episode
from jepa_cache.sources import Unit
from jepa_cache.store.controls import ControlsWriter, is_readable
from jepa_cache.store.digests import DigestTable, look_at
from jepa_cache.store.layout import StoreDamagedError
from jepa_cache.store.root import CacheRoot

if TYPE_CHECKING:
    from jepa_cache.encoder.frozen import FrozenEncoder

LIBRARIES = ("torch", "numpy", "zarr", "av", "decord")  # decord is not to be had for every machine


Unreadable = dict[tuple[str, str], str]
"""Token fingerprint and digest of a unit whose recordings cannot be read, to the reason."""


@dataclass(frozen=True)
class EncodeTask:
    """Units of one part that are missing, and what encoding them needs; small, for it may travel to a worker."""

    encode: EncodeConfig  # with the device resolved
    encoder: EncoderPreset
    weights: Path | None
    part: Part  # of the missing units alone
    num_threads: int  # of torch; another count may change the last bits of tokens that are computed on a CPU

    @property
    def identity(self) -> str:
        """Of the weights that its stores are named by."""
        return self.part.recipe["encoder"]["weights"]

    @property
    def num_bytes(self) -> int:
        """Bytes of its recordings."""
        return sum(unit.num_bytes for unit, _ in self.part.units)

    def places(self, root: CacheRoot) -> list[tuple[str, Path]]:
        """Names of its units and where their token stores lie."""
        return [(unit.name, root.tokens(self.part.tokens, digest)) for unit, digest in self.part.units]


class Filled(NamedTuple):
    """What `fill_part` did, the units that other encoders hold, and the digests of those that cannot be read, with the reason."""

    num_encoded: int
    timing: Timing
    busy: tuple[tuple[Unit, str], ...]
    unreadable: dict[str, str]


def resolve_device(wanted: str) -> str:
    """The device that `encode.device` means on this machine, see `config.machine.resolve_device`."""
    import torch

    from jepa_cache.config import machine

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return machine.resolve_device("encode.device", wanted, num_gpus)


def load_encoder(
    preset: EncoderPreset, weights: Path | None, identity: str, encode: EncodeConfig, *, device: str, num_threads: int
) -> FrozenEncoder:
    """Build the encoder as the settings use it; `num_threads` becomes the number of torch threads of this process.

    Args:
        preset: Of the encoder.
        weights: Its file or folder; None for seeded ones.
        identity: Of the weights that the tokens will be said to come from.
        encode: Settings.
        device: Resolved.
        num_threads: Of torch.

    Raises:
        ValueError: The weights that were loaded are others. The identity was asked for before recordings were hashed, which may take hours.

    Cost: hashes the files once, right after they were read.
    """
    import torch

    from jepa_cache.encoder.frozen import FrozenEncoder
    from jepa_cache.encoder.modules import load_module

    torch.set_num_threads(num_threads)
    files = [] if weights is None else [weights, *weights_files(preset, weights)]
    before = [look_at(file) for file in files]
    module = load_module(preset, weights)
    found = weights_identity(preset, weights, digest=DigestTable().digest_anew)
    if found != identity or [look_at(file) for file in files] != before:
        raise ValueError(
            f"the weights {weights or preset.name} are not those that the stores are named by: {found} now, {identity} then. They were "
            "replaced meanwhile, or are others on this machine. Nothing was encoded; the same command takes those that are there now"
        )
    return FrozenEncoder(
        preset,
        module,
        device=device,
        compute_dtype=encode.compute_dtype,
        single_frame=encode.single_frame,
        pool=encode.pool,
    )


def fill_part(
    task: EncodeTask, encoder: FrozenEncoder, root: CacheRoot, on_progress: Callable[[Timing, int], None]
) -> Filled:
    """Encode the units of a task that no other encoder is working on.

    Args:
        task: What to encode.
        encoder: From `load_encoder`.
        root: Cache root.
        on_progress: Called after every batch with the timing so far and the bytes of recordings that are through.

    Raises:
        ValueError: When the encoder overflows the stored dtype, or a unit changes while it is read.
    """
    encode, part = task.encode, task.part
    settings = DecodeSettings(encode, encoder.preset.tubelet_size, part.phase)
    with Claims(root, part.tokens) as claims:
        timing, unreadable = encode_units(
            claims.take(part.units),
            part.source,
            encoder,
            settings,
            root,
            dtype=encode.dtype,
            fingerprint=part.tokens,
            source_fingerprint=part.controls,
            card={"recipe": part.recipe},
            provenance=describe_machine(encoder, encode.batch_size, task.num_threads),
            on_progress=on_progress,
        )
    return Filled(claims.num_taken - len(unreadable), timing, tuple(claims.busy), unreadable)


def describe_machine(encoder: FrozenEncoder, batch_size: int, num_threads: int) -> dict[str, object]:
    """What is recorded of the making of a store, outside its digest."""
    import torch

    return {
        "batch_size": batch_size,
        "device": "cpu" if encoder.device.type == "cpu" else torch.cuda.get_device_name(encoder.device),
        "num_threads": num_threads,
        "versions": _library_versions() | {"python": platform.python_version()},
    }


@functools.cache
def _library_versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES if find_spec(name)}


def ensure_actions(root: CacheRoot, part: Part, space: ActionSpace, unit: Unit, digest: str) -> None:
    """Aggregate the unit's actions unless they are there; controls that were deleted are read from the recordings again."""
    store, tokens = root.actions(part.actions, digest), root.tokens(part.tokens, digest)
    if is_whole(root, store) and is_current(store, tokens):
        return
    with root.claimed(store):
        if remove_damaged(root, store, "making"):
            if is_current(store, tokens):  # another encoder made them meanwhile
                return
            root.remove(store)
        write_unit_actions(store, tokens, ensure_controls(root, part, unit, digest), space)
        root.publish(store)


def ensure_controls(root: CacheRoot, part: Part, unit: Unit, digest: str) -> Path:
    """The unit's controls; read from the recordings again where they are missing or damaged. Decodes nothing."""
    controls = root.controls(part.controls, digest)
    with suppress(StoreDamagedError):  # in the bucket; a whole copy here is as good
        root.fetch(controls)
    if not is_readable(controls):
        root.remove(controls)
        with ControlsWriter(controls) as writer:
            for recording in part.source.iter_episodes(unit):
                if isinstance(recording, Episode):
                    writer.append(recording.key, recording.controls)
            check_unchanged(unit, digest)
        root.publish(controls)
    return controls
