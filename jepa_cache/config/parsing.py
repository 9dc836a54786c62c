"""From mappings to dataclasses: unknown keys are refused with the nearest known one, types are checked."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the key, the file and the way out."""


def parse_dataclass(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build a dataclass from a mapping; keys and types must match its fields exactly.

    Raises:
        ConfigError: For unknown, missing or wrongly typed keys; `where` names the place.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    check_keys(values, list(fields), where)
    parsed = {}
    for name, field in fields.items():
        if name in values:
            parsed[name] = _coerce(values[name], hints[name], f"{where}: {name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where} lacks the key {name!r}")
    return cls(**parsed)


REMOVED = {"num_timed": "benchmarks/planner.py times the planner against a plain loop"}
"""Keys of earlier versions, and what took their place."""


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint such as "; did you mean 'lr'?", what took the place of a removed key, or the list of known names when none is near."""
    key = name.rpartition(".")[2]
    if key in REMOVED:
        return f", which was removed: {REMOVED[key]}; delete it"
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def check_keys(values: Any, known: Sequence[str], where: str) -> None:
    """Raise a ConfigError that names the first key of `values` that is not `known`, and the nearest that is."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a mapping; got {values!r}")
    for key in values:
        if key not in known:
            raise ConfigError(f"{where} has the unknown key {key!r}{nearest(str(key), known)}")


def check_choice(key: str, value: str, known: Sequence[str]) -> None:
    """Raise a ConfigError that names the nearest value where `value` is not `known`."""
    if value not in known:
        raise ConfigError(f"{key} is {value!r}{nearest(value, known)}")


def check_choices(key: str, values: Sequence[str], known: Sequence[str]) -> None:
    """Raise a ConfigError where one of the values is not `known`, or stands there twice."""
    for value in values:
        check_choice(key, value, known)
    check_once(key, values)


def check_once(key: str, values: Sequence[str]) -> None:
    """Raise a ConfigError where one of the values stands there twice."""
    for value in values:
        if values.count(value) > 1:
            raise ConfigError(f"{key} names {value!r} {values.count(value)} times; name it once")


def check_positive(key: str, value: float) -> None:
    """Raise a ConfigError where `value` is not above 0."""
    if value <= 0:
        raise ConfigError(f"{key} must be above 0; got {value}")


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """Check `value` against a type hint; ints pass for floats, lists become tuples."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        for kind in (arg for arg in args if arg is not type(None)):
            try:
                return _coerce(value, kind, where)
            except ConfigError as error:
                refused = error
        raise refused
    if hint is Any:
        return value
    if origin is dict:
        if isinstance(value, Mapping):
            return dict(value)
    elif origin is tuple:
        if isinstance(value, list | tuple):
            inner = args[:1] * len(value) if args[-1] is Ellipsis else args
            if len(inner) == len(value):
                return tuple(_coerce(item, kind, where) for item, kind in zip(value, inner, strict=True))
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif isinstance(value, hint):
        return value
    if hint is float and isinstance(value, float):
        raise ConfigError(f"{where} must be a finite number; got {value}")
    if origin is tuple:
        inner = " and ".join(dict.fromkeys(kind.__name__ for kind in args if kind is not Ellipsis))
        size = "" if args[-1] is Ellipsis else f"{len(args)} "
        way_out = f"; write [{value}]" if isinstance(value, args[0]) and args[-1] is Ellipsis else ""
        raise ConfigError(f"{where} must be a list of {size}{inner}; got {value!r} ({type(value).__name__}){way_out}")
    name = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
    raise ConfigError(f"{where} must be of type {name}; got {value!r} ({type(value).__name__})")
