"""From mappings to dataclasses, by pydantic in strict mode: ints pass for floats and lists for tuples, nothing else.

A field's annotation holds its rule (`Literal` choices, `Field(gt=0)` bounds). Dataclasses stay plain ones: they are checked
once, where a file or a command line is read.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")

# Keys of earlier versions, and what took their place.
GONE = {
    "num_timed": ", which was removed: benchmarks/planner.py times the planner against a plain loop; delete it",
    "max_episodes": "; it is called 'max_units' now and counts units of input, not recordings",
}
# pydantic's words, and plainer ones.
WORDS = {
    r"^(Input|Tuple|String|Value) should": "must",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "above",
    "less than": "below",
    "a valid array": "a list, such as [a, b]",
    "^Field required": "lacks an item",
    " after validation, not 0$": "",
}


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the key, the file and the way out."""


def parse_dataclass(
    cls: type[T], values: Mapping[str, Any], where: str, *, section: str = "", origins: Mapping[str, str] | None = None
) -> T:
    """Build a dataclass from a mapping out of YAML; keys, types and bounds must match its fields exactly.

    Messages name `where`, or by `section.key` the file of `origins` that a value comes from.

    Raises:
        ConfigError: Keys are unknown or missing, or values break their rules; names every such value.
    """
    check_keys(values, [field.name for field in dataclasses.fields(cls) if field.init], where)
    try:
        # As JSON, because there strict mode takes a list for a tuple and a mapping for a dataclass.
        return _adapter(cls).validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        refused = {}
        # Of a choice beside true and false two rules are broken; the second is told.
        switches = {fault["loc"][0] for fault in error.errors() if fault["type"] == "bool_type"}
        for fault in error.errors(include_url=False):
            name = fault["loc"][0] if fault["loc"] else ""
            key = f"{section}.{name}" if section else name
            place = (origins or {}).get(key, where.removesuffix(f": {section}"))
            if fault["type"] == "missing" and len(fault["loc"]) == 1:
                refused[name] = f"{where} lacks the key {name!r}"
            elif fault["type"] == "too_short" and name in refused and fault["input"]:
                continue  # its items are bad, as another fault says
            elif name:
                got = "" if fault["type"] == "literal_error" else f"; got {values[name]!r}"
                refused[name] = f"{place}: {key} {_explain(fault, ['false', 'true'] if name in switches else [])}{got}"
            else:  # a rule of several values
                refused[name] = str(fault.get("ctx", {}).get("error", fault["msg"]))
        raise ConfigError("\n  ".join(refused.values())) from error


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under names with dots; an empty mapping is a value."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat


def check_keys(values: Any, known: Sequence[str], where: str) -> None:
    """Raise a ConfigError that names the first key of `values` that is not `known`, and the nearest that is."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a mapping; got {values!r}")
    for key in values:
        if key not in known:
            raise ConfigError(f"{where} has the unknown key {key!r}{nearest(str(key), known)}")


def nearest(name: str, known: Sequence[str]) -> str:
    """Return a hint such as "; did you mean 'lr'?", what replaced a removed key, or the list of known names."""
    if (key := name.rpartition(".")[2]) in GONE:
        return GONE[key]
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known)) or 'none'}"


@functools.cache
def _adapter(cls: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(cls)


def _explain(fault: Any, others: list[str]) -> str:
    """The rest of a sentence that begins with the key: the rule that a value breaks; `others` are choices beside those of a literal."""
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    if fault["type"] == "literal_error":
        choices = [*others, *re.findall(r"'([^']*)'", fault["ctx"]["expected"])]
        return f"is {fault['input']!r}{nearest(str(fault['input']), choices)}"
    return functools.reduce(lambda text, pair: re.sub(*pair, text), WORDS.items(), fault["msg"])
