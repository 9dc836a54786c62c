"""JSON files of strangers, read within bounds: a file or line above its bound is refused before it is parsed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
        with path.open("rb") as file:
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
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise JsonError(f"line {number} of {path.name} is longer than {MAX_LINE_BYTES} bytes")
                if line.strip():
                    yield _parse(line, f"line {number} of {path.name}")
    except OSError as error:
        raise JsonError(f"{path} cannot be read: {error.strerror or error}") from error


def _parse(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # Bad UTF-8 is a ValueError; depth without end a RecursionError.
        raise JsonError(f"{where} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise JsonError(f"{where} must hold a JSON object; got {repr(value)[:60]}")
    return value
