"""JSON files of strangers, read within bounds: a file or line above its bound is refused before it is parsed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from jepa_cache.media.tar import describe_stand_in

MAX_LINE_BYTES = 1 << 20
"""Parsed JSON can take 30 times its bytes, so the bound is on what one parse may see."""


class JsonError(ValueError):
    """A JSON file that cannot be used; the message names it."""


def read_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        JsonError: The file is missing, above `max_bytes`, no JSON, or no object.
    """
    try:
        with _open(path) as file:
            # A read sets aside what it is asked for, however small the file is.
            data = file.read(min(os.fstat(file.fileno()).st_size, max_bytes) + 1)
    except OSError as error:
        raise JsonError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) > max_bytes:
        raise JsonError(f"{path.name} has more than {max_bytes} bytes, the most that is read of such a file")
    return _parse(data, path.name)


def iter_objects(path: Path) -> Iterator[dict[str, Any]]:
    """Read a jsonl file line by line; empty lines are left out.

    Raises:
        JsonError: The file is missing, a line is above 1 MiB, or one is no JSON object.
    """
    try:
        with _open(path) as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise JsonError(f"line {number} of {path.name} is longer than {MAX_LINE_BYTES} bytes")
                if line.strip():
                    yield _parse(line, f"line {number} of {path.name}")
    except OSError as error:
        raise JsonError(f"{path} cannot be read: {error.strerror or error}") from error


def read_rate(fields: Mapping[str, Any], name: str, where: str) -> float:
    """A field that holds a rate in Hz.

    Raises:
        JsonError: It is no positive, finite number; one of 400 digits is none either.
    """
    value = fields.get(name)
    rate = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            rate = float(value)
    if not (math.isfinite(rate) and rate > 0):
        raise JsonError(f"{where}: {name} must be a positive number, in Hz; got {repr(value)[:60]}")
    return rate


def _open(path: Path) -> BinaryIO:
    """Open a plain file; to open a pipe in its place would wait for ever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise JsonError(f"{path} is no plain file but a pipe, device or folder")
    return path.open("rb")


def _parse(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # Bad UTF-8 is a ValueError; depth without end a RecursionError.
        raise JsonError(f"{where} is no JSON: {describe_stand_in(data) or error}") from error
    if not isinstance(value, dict):
        raise JsonError(f"{where} must hold a JSON object; got {repr(value)[:60]}")
    return value
