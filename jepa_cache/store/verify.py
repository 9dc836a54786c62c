"""Whether a published store is whole: its file list against the disk, and on demand every byte."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jepa_cache.store import layout
from jepa_cache.store.reader import WAY_OUT, StoreDamagedError
from jepa_cache.store.recipe import canonical_json, file_digest


class StoreFile(NamedTuple):
    """What store.json says: `card` describes the content, `digest` covers it, `provenance` is how it was made."""

    card: dict[str, Any]
    digest: str
    provenance: dict[str, Any]
    num_bytes: int


def write_store_file(folder: Path, card: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
    """Write store.json of a finished store that is not published yet: every file with its size and sha256."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listing = {
        str(path.relative_to(folder)): {"num_bytes": path.stat().st_size, "sha256": file_digest(path)} for path in files
    }
    content = {"format_version": layout.FORMAT_VERSION, "card": dict(card), "files": listing}
    (folder / layout.STORE_FILE).write_bytes(canonical_json({"content": content, "provenance": dict(provenance)}))


def read_store_file(store: Path) -> StoreFile:
    """Read store.json of a published store.

    Raises:
        StoreDamagedError: When it is missing or no valid JSON.
        ValueError: When another version of the program wrote the store.
    """
    document = _read_document(store)
    content = document["content"]
    return StoreFile(
        card=content["card"],
        digest=hashlib.sha256(canonical_json(content)).hexdigest(),
        provenance=document["provenance"],
        num_bytes=sum(entry["num_bytes"] for entry in content["files"].values()),
    )


def check_store(store: Path, *, read_data: bool = False) -> StoreFile:
    """Check that every file of a store is there with its size, and with `read_data` that its bytes are unchanged.

    Cost: one stat per file (a zarr shard is 512 steps); with `read_data` it reads everything.

    Raises:
        StoreDamagedError: Naming the first file that is missing or differs.
    """
    for name, entry in _read_document(store)["content"]["files"].items():
        path = store / name
        if not path.is_file():
            raise StoreDamagedError(f"{path} is missing; {WAY_OUT}")
        size = path.stat().st_size
        if size != entry["num_bytes"]:
            raise StoreDamagedError(f"{path} has {size} bytes, not {entry['num_bytes']}; {WAY_OUT}")
        if read_data and file_digest(path) != entry["sha256"]:
            raise StoreDamagedError(f"{path} has changed since it was written (sha256 differs); {WAY_OUT}")
    return read_store_file(store)


def _read_document(store: Path) -> dict[str, Any]:
    path = store / layout.STORE_FILE
    try:
        document = json.loads(path.read_bytes())
        version = document["content"]["format_version"]
    except FileNotFoundError as error:
        raise StoreDamagedError(f"{path} is missing; {WAY_OUT}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StoreDamagedError(f"{path} is damaged ({error}); {WAY_OUT}") from error
    if version != layout.FORMAT_VERSION:
        # Not damaged: another version of this program wrote it, and nobody asked to replace it.
        raise ValueError(
            f"{store} has store format {version}, this program reads {layout.FORMAT_VERSION}; set cache.root to another "
            "folder, or delete this one"
        )
    return document
