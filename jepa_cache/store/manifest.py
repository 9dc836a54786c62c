"""The manifest: which stores make up one data set under one recipe. Stage two reads what it lists and nothing else.

It holds no paths, times or hosts and has sorted keys, so the same data under the same recipe gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jepa_cache.store.recipe import DIGEST_LENGTH, canonical_json
from jepa_cache.store.root import CacheRoot, atomic_file, remove_stale_temporaries

MANIFEST_VERSION = 1


@dataclass(frozen=True)
class ManifestEntry:
    """One unit of input and its stores."""

    unit_digest: str  # sha256 of the unit's bytes
    tokens_digest: str  # of the token store's content
    actions_digest: str
    num_steps: int
    num_segments: int
    num_episodes: int


@dataclass(frozen=True)
class Manifest:
    """One data set under one recipe."""

    dataset: str
    fingerprint: str
    recipe: dict[str, Any]
    action_fingerprint: str
    action_recipe: dict[str, Any]
    source_fingerprint: str
    num_tokens: int
    width: int
    grid: tuple[int, int]  # rows, columns of patches
    mode: str
    encoder: str  # preset name
    encoder_trained: bool
    comparable: bool  # False in clip mode: early steps have seen later frames
    skipped: tuple[dict[str, str], ...]  # key and reason of every recording left out
    notes: tuple[str, ...]
    entries: tuple[ManifestEntry, ...]

    @property
    def num_steps(self) -> int:
        """Steps of all stores."""
        return sum(entry.num_steps for entry in self.entries)

    def to_bytes(self) -> bytes:
        """The one spelling of this manifest."""
        return canonical_json({"manifest_version": MANIFEST_VERSION, **asdict(self)})

    @property
    def digest(self) -> str:
        """Hash of the manifest's bytes: the identity of a training set."""
        return hashlib.sha256(self.to_bytes()).hexdigest()[:DIGEST_LENGTH]


def write_manifest(manifest: Manifest, paths: Sequence[Path]) -> None:
    """Write the same bytes to every path, atomically; an identical file is left untouched."""
    content = manifest.to_bytes()
    for path in paths:
        if path.is_file() and path.read_bytes() == content:
            continue
        remove_stale_temporaries(path.parent)
        with atomic_file(path) as temporary:
            temporary.write_bytes(content)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        ValueError: When it is missing, damaged or of another version; says which command makes it.
    """
    try:
        document = json.loads(path.read_bytes())
        version = document.pop("manifest_version")
        if version != MANIFEST_VERSION:
            raise ValueError(f"it has version {version}, this program reads {MANIFEST_VERSION}")
        document["entries"] = tuple(ManifestEntry(**entry) for entry in document["entries"])
        for key in ("skipped", "notes", "grid"):
            document[key] = tuple(document[key])
        return Manifest(**document)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; run `python stages/encode.py` first") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no valid manifest ({error}); run `python stages/encode.py` again") from error


def find_missing(manifest: Manifest, root: CacheRoot) -> list[Path]:
    """Stores that the manifest lists and the root does not hold."""
    paths = []
    for entry in manifest.entries:
        for path in (
            root.tokens(manifest.fingerprint, entry.unit_digest),
            root.actions(manifest.action_fingerprint, entry.unit_digest),
        ):
            if not path.is_dir():
                paths.append(path)
    return paths
