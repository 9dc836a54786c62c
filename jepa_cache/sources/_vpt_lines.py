"""Lines of VPT-like jsonl files: parsed one by one, with checked access to their fields; knows no meaning of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

_REQUIRED = object()
MAX_LINE_BYTES = 1 << 20
"""Real lines have up to 1.2 kB. JSON may take 30 times its bytes when parsed, so a huge line is refused before that."""


class LineError(ValueError):
    """A line that cannot be used; the message holds its number, counted from 1, and the field."""


class Line:
    """One parsed line with checked access to its fields; a dotted name reaches into an inner object."""

    def __init__(self, number: int, record: dict[str, Any]) -> None:
        """Hold line `number`, counted from 1."""
        self.number = number
        self._record = record

    def read(self, name: str, default: Any = _REQUIRED) -> Any:
        """The raw value of a field, or `default` where it is absent.

        Raises:
            LineError: The field is absent and has no default, or what should hold it is no object.
        """
        value: Any = self._record
        for part in name.split("."):
            if not isinstance(value, dict):
                raise LineError(f"line {self.number}: {name} lies in something that is no object")
            if part not in value:
                if default is _REQUIRED:
                    raise LineError(f"line {self.number}: the field {name} is missing")
                return default
            value = value[part]
        return value

    def read_float(self, name: str, default: Any = _REQUIRED) -> float:
        """A finite number; ints pass."""
        value = self.read(name, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, "a number", value)
        if (isinstance(value, int) and value.bit_length() > 63) or not math.isfinite(value):
            raise self.wrong(name, "a finite number", value)
        return float(value)

    def read_int(self, name: str, default: Any = _REQUIRED) -> int:
        """An integer of 64 bits; 3.0 passes for 3."""
        value = self.read_float(name, default)
        if value is not default and (value != int(value) or abs(value) >= 2**63):
            raise self.wrong(name, "an integer", value)
        return int(value)

    def read_bool(self, name: str, default: Any = _REQUIRED) -> bool:
        """True or false; 0 and 1 do not pass."""
        value = self.read(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return value

    def read_list(self, name: str, kind: type, default: Any = _REQUIRED) -> list[Any]:
        """A list of `kind` (str or int)."""
        value = self.read(name, default)
        if value is not default and not (
            isinstance(value, list) and all(isinstance(item, kind) and not isinstance(item, bool) for item in value)
        ):
            raise self.wrong(name, f"a list of {kind.__name__}", value)
        return list(value)

    def wrong(self, name: str, wanted: str, value: Any) -> LineError:
        """The error for a field that holds something else than `wanted`."""
        return LineError(f"line {self.number}: {name} must be {wanted}; got {repr(value)[:60]}")


def iter_lines(data: bytes) -> Iterator[Line]:
    """Parse a jsonl file line by line; empty lines at its end are allowed.

    Raises:
        LineError: No line at all, a line above 1 MiB, or one that is no JSON object.
    """
    lines = split_lines(data)
    for number, text in enumerate(lines, start=1):
        yield parse_line(number, text, len(lines))


def split_lines(data: bytes) -> list[bytes]:
    """The lines of a jsonl file, without empty ones at its end. Raises a LineError when there is none."""
    lines = data.removeprefix(b"\xef\xbb\xbf").rstrip().split(b"\n")
    if lines == [b""]:
        raise LineError("the jsonl file holds no line")
    return lines


def parse_line(number: int, text: bytes, num_lines: int) -> Line:
    """Parse line `number` of `num_lines`. Raises a LineError when it is too long, no JSON, or no object."""
    if len(text) > MAX_LINE_BYTES:
        raise LineError(f"line {number} of {num_lines} has {len(text)} bytes; at most {MAX_LINE_BYTES} are read")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:  # Bad UTF-8 is a ValueError; depth without end a RecursionError.
        raise LineError(f"line {number} of {num_lines} is no JSON: {error}") from error
    if not isinstance(record, dict):
        raise LineError(f"line {number} of {num_lines} is no JSON object; got {repr(record)[:60]}")
    return Line(number, record)
