"""Fills the missing stores of one group, in the plain run as in a Dask worker, beside any number of other encoders.

`fill_group` claims units one by one, encodes them and publishes their stores; `ensure_actions` sums up actions and states from the controls
that were kept; `compare_recordings` finds recordings that share a key or a content.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jepa_cache.config import machine
from jepa_cache.config.schema import EncodeConfig
from jepa_cache.encoder import KINDS
from jepa_cache.encoder.weights import weights_identity
from jepa_cache.encoding.actions import write_unit_actions
from jepa_cache.encoding.groups import EncodingGroup, OpenedEncoder
from jepa_cache.encoding.pipeline import Timing, encode_units
from jepa_cache.encoding.units import check_unchanged
from jepa_cache.episode import Episode
from jepa_cache.files import Claim
from jepa_cache.sources import Unit
from jepa_cache.store import layout
from jepa_cache.store.controls import ControlsWriter, is_readable, iter_controls
from jepa_cache.store.digests import DigestTable, look_at
from jepa_cache.store.layout import StoreDamagedError, StoreFile
from jepa_cache.store.reader import read_table
from jepa_cache.store.root import CacheRoot

if TYPE_CHECKING:
    from jepa_cache.encoder.frozen import FrozenEncoder

LIBRARIES = ("torch", "numpy", "zarr", "av", "decord")  # decord is not to be had for every machine
POLL_S = 1.0
MAX_SHOWN = 10

Unreadable = dict[tuple[str, str], str]
"""Token fingerprint and digest of a unit whose recordings cannot be read, to the reason."""


class FillResult(NamedTuple):
    """What `fill_group` did, the units that other encoders hold, and the digests of those that cannot be read, with the reason."""

    num_encoded: int
    timing: Timing
    busy: tuple[Unit, ...]
    unreadable: dict[str, str]


def resolve_device(wanted: str) -> str:
    """The device that `encode.device` means on this machine, see `config.machine.resolve_device`."""
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return machine.resolve_device("encode.device", wanted, num_gpus)


def load_encoder(opened: OpenedEncoder, encode: EncodeConfig, *, device: str, num_threads: int) -> FrozenEncoder:
    """Build the encoder as the settings use it; `num_threads` becomes the number of torch threads of this process.

    Args:
        opened: Preset, files and identity of the weights that the tokens will be said to come from.
        encode: Settings.
        device: Resolved.
        num_threads: Of torch.

    Raises:
        ValueError: The weights that were loaded are others. Their identity was found before recordings were hashed, which may take hours.

    Cost: hashes the files once, right after they were read.
    """
    import torch

    from jepa_cache.encoder.frozen import FrozenEncoder, load_module

    preset, weights, identity = opened
    torch.set_num_threads(num_threads)
    files = [] if weights is None else [weights, *KINDS[preset.kind].files(weights)]
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


def fill_group(
    group: EncodingGroup, encoder: FrozenEncoder, root: CacheRoot, on_progress: Callable[[Timing, int], None]
) -> FillResult:
    """Encode the units of a group that no other encoder is working on.

    Args:
        group: What to encode.
        encoder: From `load_encoder`.
        root: Cache root.
        on_progress: Called after every batch with the timing so far and the bytes of recordings processed so far.

    Raises:
        ValueError: When the encoder overflows the stored dtype, or a unit changes while it is read.
    """
    provenance = describe_machine(encoder, group.encode.batch_size, group.num_threads)
    with Claims(root, group.fingerprint) as claims:
        timing, unreadable = encode_units(
            claims.take(group.units), group, encoder, root, provenance=provenance, on_progress=on_progress
        )
    return FillResult(claims.num_taken - len(unreadable), timing, tuple(claims.busy), unreadable)


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


def ensure_actions(root: CacheRoot, group: EncodingGroup, unit: Unit, tokens: StoreFile | None = None) -> StoreFile:
    """Sum up the unit's actions unless they exist; controls that were deleted are read from the recordings again.

    Token stores of two recipes share their actions as long as their steps are the same. They are not where a video can be decoded under
    one recipe only, for its episode is then missing in the other.

    Args:
        root: Cache root.
        group: Of the unit.
        unit: Its token store exists.
        tokens: What `read_whole` says of that store; None looks again.

    Returns:
        What the store.json of the actions says.
    """
    store, tokens_store = group.actions(root, unit), group.tokens(root, unit)
    tokens = tokens or root.find_store(tokens_store)

    def current() -> StoreFile | None:
        found = read_whole(root, store)
        return found if found and found.metadata.get("steps_digest") == tokens.metadata["steps_digest"] else None

    if (found := current()) is not None:
        return found
    with root.claimed(store):
        if remove_damaged(root, store, "making"):
            if (found := current()) is not None:  # another encoder made them meanwhile
                return found
            root.remove(store)
        write_unit_actions(store, tokens_store, ensure_controls(root, group, unit), group.space)
        root.publish(store)
    return root.find_store(store)


def ensure_controls(root: CacheRoot, group: EncodingGroup, unit: Unit) -> Path:
    """The unit's controls; read from the recordings again where they are missing or damaged. Decodes nothing."""
    controls = group.controls(root, unit)
    with suppress(StoreDamagedError):  # in the bucket; a whole copy here is as good
        root.fetch(controls)
    if not is_readable(controls):
        root.remove(controls)
        with ControlsWriter(controls) as writer:
            for recording in group.source.iter_episodes(unit):
                if isinstance(recording, Episode):
                    writer.append(recording.key, recording.controls)
            check_unchanged(unit)
        root.publish(controls)
    return controls


class Claims:
    """The units that this process has taken under one recipe, each until its store is there.

    The lock of a process that dies is let go by the kernel, so its units can be taken at once; what it had not published
    is lost, at most one unit.

    Attributes:
        busy: Units that another encoder held when it was their turn.
        num_taken: Units handed out.
    """

    def __init__(self, root: CacheRoot, fingerprint: str) -> None:
        self.busy: list[Unit] = []
        self.num_taken = 0
        self._root, self._fingerprint = root, fingerprint
        self._held: dict[Path, Claim] = {}

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: Any) -> None:
        with ExitStack() as stack:  # all of them, also when the file of one cannot be removed
            for claim in self._held.values():
                stack.callback(claim.release)
        self._held.clear()

    def take(self, units: Sequence[Unit]) -> Iterator[Unit]:
        """Claim one unit after the other, without those that others hold or have finished meanwhile.

        A store that is there but not whole is removed, by name, once its unit is ours.
        """
        for unit in units:
            for store in [store for store in self._held if store.is_dir()]:  # published meanwhile
                self._held.pop(store).release()
            store = self._root.tokens(self._fingerprint, unit.digest)
            if read_whole(self._root, store) is not None:  # its maker may be holding the claim still
                continue
            claim = self._root.claim(store)
            if claim is None:
                self.busy.append(unit)
                continue
            self._held[store] = claim
            if not remove_damaged(self._root, store, "encoding"):
                self.num_taken += 1
                yield unit


def read_whole(root: CacheRoot, store: Path) -> StoreFile | None:
    """What the store.json of a published store says whose files all have their sizes; else None. Cost: one stat per file."""
    try:
        return root.find_store(store)
    except StoreDamagedError:
        return None


def remove_damaged(root: CacheRoot, store: Path, what: str) -> bool:
    """Whether a store exists and is whole; a damaged one is named and removed. Only for who has claimed it.

    Args:
        root: Cache root.
        store: The store.
        what: What comes next, for the message: "encoding" it again.
    """
    try:
        return root.find_store(store) is not None
    except StoreDamagedError as error:
        print(f"damaged, {what} it again: {error}")
        root.remove(store)
        return False


def wait_for_others(root: CacheRoot, stores: Sequence[tuple[str, Path]], on_wait: Callable[[str], None]) -> None:
    """Wait until one of the stores that others are making is published, or its maker is gone.

    Args:
        root: Cache root.
        stores: Names of the units, and where their stores will lie.
        on_wait: Is called with the name of a unit, once a second.
    """
    while all(root.is_claimed(store) and read_whole(root, store) is None for _, store in stores):
        on_wait(stores[0][0])
        time.sleep(POLL_S)


class _Recording(NamedTuple):
    """One recording in the cache: its key, and the name and digest of its unit."""

    key: str
    unit: str
    digest: str

    def __str__(self) -> str:
        return f"{self.key} in {self.unit}"


def compare_recordings(root: CacheRoot, group: EncodingGroup) -> list[str]:
    """Sentences that name the recordings of a group that are equal: the same pictures at their steps and the same controls.

    Raises:
        ValueError: Units hold different recordings under one key, which everything later would take for one episode.

    Cost: the step table of every store, and the controls of those that may be equal or share a key.
    """
    by_key: dict[str, list[_Recording]] = {}
    by_steps: dict[bytes, list[_Recording]] = {}
    for unit in group.units:
        for key, steps in _iter_steps(group.tokens(root, unit)):
            recording = _Recording(key, unit.name, unit.digest)
            by_key.setdefault(key, []).append(recording)
            by_steps.setdefault(steps, []).append(recording)
    equal = [
        same for recordings in by_steps.values() if len(recordings) > 1 for same in _find_equal(root, group, recordings)
    ]
    number_of = {recording: number for number, same in enumerate(equal) for recording in same}
    clashes = [
        recordings
        for recordings in by_key.values()
        if len(recordings) > 1 and len({number_of.get(recording, recording) for recording in recordings}) > 1
    ]
    if clashes:
        raise ValueError(
            f"{len(clashes)} keys name different recordings in several units: {_shorten(clashes, ' and ')}. They would count as one "
            "episode. Rename one of each (a folder of its own in the tar is enough) or remove its unit; what was encoded is kept"
        )
    if not equal:
        return []
    num_copies = sum(len(same) - 1 for same in equal)
    return [f"{num_copies} recordings have the same content as another one: {_shorten(equal, ' = ')}"]


def _iter_steps(store: Path) -> Iterator[tuple[str, bytes]]:
    """Key and a digest of the brightness of the pictures at all steps, for each episode of a store."""
    steps = read_table(store, layout.STEPS_FILE)
    luma = np.stack([steps.column(name).to_numpy() for name in ("luma_mean", "luma_std")])
    runs: dict[str, list[np.ndarray]] = {}
    for row in read_table(store, layout.SEGMENTS_FILE).to_pylist():
        runs.setdefault(row["episode"], []).append(luma[:, row["start"] : row["stop"]])
    for key, pieces in runs.items():
        yield key, hashlib.sha256(np.ascontiguousarray(np.concatenate(pieces, axis=1))).digest()


def _find_equal(root: CacheRoot, group: EncodingGroup, recordings: Sequence[_Recording]) -> list[list[_Recording]]:
    """The recordings whose controls are equal, in groups of two and more."""
    groups: dict[bytes, list[_Recording]] = {}
    for digest in sorted({recording.digest for recording in recordings}):
        path = root.controls(group.source_fingerprint, digest)
        root.fetch(path)
        keys = {recording.key: recording for recording in recordings if recording.digest == digest}
        for key, controls in iter_controls(path):
            if key in keys:
                groups.setdefault(_digest_controls(controls), []).append(keys[key])
    return [group for group in groups.values() if len(group) > 1]


def _digest_controls(controls: Mapping[str, np.ndarray]) -> bytes:
    hasher = hashlib.sha256()
    for name in sorted(controls):
        values = np.ascontiguousarray(controls[name])
        hasher.update(f"{name} {values.dtype.str} {len(values)}\n".encode())
        hasher.update(values.data)
    return hasher.digest()


def _shorten(groups: Sequence[Sequence[_Recording]], joint: str) -> str:
    shown = [
        joint.join(map(str, group[:MAX_SHOWN])) + (" ..." if len(group) > MAX_SHOWN else "")
        for group in groups[:MAX_SHOWN]
    ]
    return "; ".join(shown) + (f"; and {len(groups) - MAX_SHOWN} more" if len(groups) > MAX_SHOWN else "")
