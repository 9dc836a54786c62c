"""The manifest: which stores make up one data set under one recipe. Stage two reads what it lists and nothing else.

It holds no paths, times or hosts and has sorted keys, so the same data under the same recipe gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson

from jepa_cache.config.parsing import ConfigError
from jepa_cache.files import atomic_file, file_digest, remove_stale_temporaries
from jepa_cache.store.recipe import DIGEST_LENGTH, StoreKey, canonical_json, fingerprint, unit_id

MANIFEST_VERSION = 1
SELF_DIGEST = "sha256"  # of the manifest without this entry
STAND_IN = "0" * 64
HELD_BACK = "held_back.json"  # beside a manifest whose encode has not ended well


@dataclass(frozen=True)
class ManifestEntry:
    """One unit of input and its stores."""

    unit_digest: str  # sha256 of the unit's bytes
    tokens_digest: str  # of the token store's content
    actions_digest: str
    num_steps: int
    num_segments: int
    num_episodes: int
    # What storing cost the tokens: root mean square error relative to the values, and largest error. None where a store does not say.
    reconstruction_rmse: float | None = None
    reconstruction_max_abs: float | None = None


@dataclass(frozen=True)
class ManifestPart:
    """One data set from one camera at one starting offset: all its stores share one recipe."""

    dataset: str  # preset name
    weight: float  # relative rate at which training draws windows from the parts of this data set together
    camera: str | None  # None where the source has one view
    phase: int  # first sampled frame
    fingerprint: str
    recipe: dict[str, Any]
    action_fingerprint: str
    action_recipe: dict[str, Any]
    source_fingerprint: str
    skipped: tuple[dict[str, str], ...]  # key and reason of every skipped recording
    notes: tuple[str, ...]
    entries: tuple[ManifestEntry, ...]

    def keys(self, entry: ManifestEntry) -> tuple[StoreKey, StoreKey, StoreKey]:
        """The stores of one unit: tokens, actions, controls."""
        unit = unit_id(entry.unit_digest)
        return (
            StoreKey("tokens", self.fingerprint, unit),
            StoreKey("actions", self.action_fingerprint, unit),
            StoreKey("controls", self.source_fingerprint, unit),
        )

    def listed(self, entry: ManifestEntry) -> tuple[tuple[StoreKey, str | None], ...]:
        """The stores of one unit and the digests that are listed; of controls none is."""
        return tuple(zip(self.keys(entry), (entry.tokens_digest, entry.actions_digest, None), strict=True))


@dataclass(frozen=True)
class Manifest:
    """What stage two trains on: one part, or several of one encoder and one action space."""

    dataset: str  # preset name; of a mixture, its own
    num_tokens: int
    width: int
    grid: tuple[int, int]  # rows, columns of patches
    mode: str
    encoder: str  # preset name
    encoder_trained: bool
    comparable: bool  # False in clip mode: early steps have seen later frames
    action_space: str
    parts: tuple[ManifestPart, ...]
    encoder_origin: str | None = None  # whose weights the encoder has, where its preset says so

    @property
    def num_steps(self) -> int:
        """Steps of all stores."""
        return sum(entry.num_steps for entry in self.entries)

    @cached_property
    def entries(self) -> tuple[ManifestEntry, ...]:
        """Entries of all parts, in order; the n-th is store number n of the training set."""
        return tuple(entry for part in self.parts for entry in part.entries)

    @cached_property
    def stores(self) -> tuple[tuple[ManifestPart, ManifestEntry], ...]:
        """Every entry with its part, in the order of `entries`."""
        return tuple((part, entry) for part in self.parts for entry in part.entries)

    @property
    def skipped(self) -> tuple[dict[str, str], ...]:
        """Key and reason of every recording that was skipped in any part."""
        return tuple(recording for part in self.parts for recording in part.skipped)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on the recordings of all parts, each once."""
        return tuple(dict.fromkeys(note for part in self.parts for note in part.notes))

    @property
    def recipe(self) -> dict[str, Any]:
        """The first part's token recipe; parts differ in source, camera and phase only."""
        return self.parts[0].recipe

    @property
    def fingerprint(self) -> str:
        """Identity of the token recipes: that of the only part, else a hash of all."""
        return _joint([part.fingerprint for part in self.parts])

    @property
    def action_fingerprint(self) -> str:
        """Identity of the action recipes, in the same way."""
        return _joint([part.action_fingerprint for part in self.parts])

    def to_bytes(self) -> bytes:
        """The one spelling of this manifest, with a hash of all the rest in it."""
        return self._spelled

    @cached_property
    def _spelled(self) -> bytes:
        parts = [{**vars(part), "entries": [vars(entry) for entry in part.entries]} for part in self.parts]
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        if self.encoder_origin is None:  # absent, as in manifests from before it
            del fields["encoder_origin"]
        # Spelled once, with a stand-in for the hash: of ten thousand stores it takes a quarter of a second.
        document = {"manifest_version": MANIFEST_VERSION, **fields, "parts": parts, SELF_DIGEST: STAND_IN}
        spelled = canonical_json(document)
        digest = hashlib.sha256(spelled.replace(_digest_line(STAND_IN), b"", 1)).hexdigest()
        return spelled.replace(_digest_line(STAND_IN), _digest_line(digest), 1)

    @cached_property
    def digest(self) -> str:
        """Hash of the manifest's bytes: the identity of a training set."""
        return hashlib.sha256(self.to_bytes()).hexdigest()[:DIGEST_LENGTH]


def _digest_line(digest: str) -> bytes:
    return f'\n  "{SELF_DIGEST}": "{digest}",'.encode()


def _joint(fingerprints: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(fingerprints))
    return distinct[0] if len(distinct) == 1 else fingerprint({"parts": distinct})


def write_manifest(manifest: Manifest, paths: Sequence[Path]) -> None:
    """Write the same bytes to every path, atomically; an identical file is left untouched."""
    content = manifest.to_bytes()
    for path in paths:
        remove_stale_temporaries(path.parent)
        if path.is_file() and path.read_bytes() == content:
            continue
        with atomic_file(path) as temporary:
            temporary.write_bytes(content)


@contextmanager
def replaced(path: Path) -> Iterator[None]:
    """Hold back the manifest at `path` until the block that is to replace it ends well; its bytes are not touched.

    A file beside it says that it is held back: also after a kill, and nothing is lost where the next try succeeds. A setting that is
    refused (ConfigError) leaves all as it was, as where it is refused before the block.
    """
    mark = path.with_name(HELD_BACK)
    failed_before = mark.is_file()
    if path.is_file():
        with atomic_file(mark) as temporary:
            temporary.write_bytes(canonical_json({"manifest": file_digest(path)}))
    try:
        yield
    except ConfigError:
        if not failed_before:
            mark.unlink(missing_ok=True)
        raise
    mark.unlink(missing_ok=True)


def why_held_back(path: Path) -> str | None:
    """Why the manifest at `path` is not to be used: the encode that was to replace it failed. None where it may be."""
    mark = path.with_name(HELD_BACK)
    if not (mark.is_file() and path.is_file()):
        return None
    if json.loads(mark.read_bytes())["manifest"] != file_digest(path):  # another was put there since, by `dvc checkout`
        return None
    return (
        f"{path} is from before the last `python stages/encode.py`, which failed, was interrupted or is still running. "
        "Run it again: what was encoded is kept. "
        f"Or delete {mark} to use the manifest as it is"
    )


def read_manifest(path: Path) -> Manifest:
    """Read a manifest; ValueError where it is missing, damaged or of another version says which command makes it."""
    try:
        raw = path.read_bytes()
        document = orjson.loads(raw)
        version = document.pop("manifest_version")
        if version != MANIFEST_VERSION:
            raise ValueError(f"it has version {version}, this program reads {MANIFEST_VERSION}")
        digest = str(document.pop(SELF_DIGEST, None))
        if digest != hashlib.sha256(raw.replace(_digest_line(digest), b"", 1)).hexdigest():
            raise ValueError("it has changed since it was written: its sha256 differs")
        document["parts"] = tuple(_read_part(part) for part in document["parts"])
        document["grid"] = tuple(document["grid"])
        return Manifest(**document)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; run `python stages/encode.py` first") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no valid manifest ({error}); run `python stages/encode.py` again") from error


def _read_part(document: dict[str, Any]) -> ManifestPart:
    _check_names(document, ("fingerprint", "action_fingerprint", "source_fingerprint"), DIGEST_LENGTH)
    for entry in document["entries"]:
        _check_names(entry, ("unit_digest", "tokens_digest", "actions_digest"), 2 * DIGEST_LENGTH)
    document["entries"] = tuple(ManifestEntry(**entry) for entry in document["entries"])
    return ManifestPart(**{**document, "skipped": tuple(document["skipped"]), "notes": tuple(document["notes"])})


def _check_names(document: Mapping[str, object], keys: Sequence[str], length: int) -> None:
    """Names become paths below the cache root, so that anything else could lead elsewhere."""
    for key in keys:
        name = document[key]
        if not isinstance(name, str) or not re.fullmatch(rf"[0-9a-f]{{{length}}}", name):
            raise ValueError(f"{key} is {length} hexadecimal digits, not {name!r}")
