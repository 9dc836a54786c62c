"""Recipes, everything that decides the numbers in a store, as plain JSON; their hash, the fingerprint; and what names a store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

DIGEST_LENGTH = 32  # hex digits: 128 bits, far beyond accidental collision, and paths stay readable


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value that is hashed and stored: sorted keys, two spaces, no NaN, final newline."""
    return (json.dumps(value, sort_keys=True, indent=2, allow_nan=False) + "\n").encode()


def fingerprint(recipe: Mapping[str, Any]) -> str:
    """Hash of a recipe; equal for equal recipes on every machine."""
    return hashlib.sha256(canonical_json(recipe)).hexdigest()[:DIGEST_LENGTH]


def unit_id(digest: str) -> str:
    """The name under which a unit of input is stored: the head of its content digest."""
    return digest[:DIGEST_LENGTH]


class StoreKey(NamedTuple):
    """Names a store: "tokens", "actions" or "controls", the fingerprint of its recipe, and the id of its unit."""

    kind: str
    fingerprint: str
    unit: str


def inner_path(name: str) -> str:
    """The name of a file inside a store, as it is; ValueError where it leads out of the store."""
    if {"", ".", ".."} & set(name.split("/")):  # a leading slash leaves an empty part
        raise ValueError(f"{name!r} leads out of the store")
    return name


def recipe_changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Every field that differs between two recipes, as `encoder.rope: 'tiled' -> 'paired'`, sorted by name."""
    changes = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes += recipe_changes(before, after, f"{prefix}{key}.")
        elif before != after:
            changes.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return changes
