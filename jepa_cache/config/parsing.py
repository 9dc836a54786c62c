"""From mappings to dataclasses, by pydantic in strict mode: ints pass for floats and lists for tuples.

A field's annotation holds its rule (`Literal` choices, `Field(gt=0)` bounds); its `description` is the reason.
Dataclasses stay plain ones: they are checked once, where a file or a command line is read.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

T = TypeVar("T")

STRICT = ConfigDict(strict=True, allow_inf_nan=False)


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the key, the file and the way out."""


def parse_dataclass(
    cls: type[T], values: Mapping[str, Any], where: str, *, section: str = "", origins: Mapping[str, str] | None = None
) -> T:
    """Build a dataclass from a mapping; keys, types and bounds must match its fields exactly.

    Args:
        cls: Any dataclass.
        values: From YAML, of any keys.
        where: File or section that messages name.
        section: Of params.yaml; stands before the keys in messages.
        origins: Files that values come from in place of `where`, by `section.key`.

    Raises:
        ConfigError: Keys are unknown or missing, or values break their rules; names every such value.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    check_keys(values, list(fields), where)
    parsed, refused = {}, []
    for name, (hint, adapter) in _adapters(cls).items():
        if name in values:
            value = values[name]
            try:
                parsed[name] = adapter.validate_python(tuple(value) if isinstance(value, list) else value)
            except ValidationError as error:
                key = f"{section}.{name}" if section else name
                place = (origins or {}).get(key, where.removesuffix(f": {section}"))
                refused.append(f"{place}: {key} {_explain(error, value, hint)}")
        elif fields[name].default is dataclasses.MISSING and fields[name].default_factory is dataclasses.MISSING:
            refused.append(f"{where} lacks the key {name!r}")
    if refused:
        raise ConfigError("\n".join(refused))
    return cls(**parsed)


REMOVED = {"num_timed": "benchmarks/planner.py times the planner against a plain loop"}
"""Keys of earlier versions, and what took their place."""
RENAMED = {"max_episodes": "max_units"}  # keys of earlier versions


def nearest(name: str, known: Sequence[str]) -> str:
    """Return a hint such as "; did you mean 'lr'?", what replaced a removed key, or the list of known names."""
    key = name.rpartition(".")[2]
    if key in REMOVED:
        return f", which was removed: {REMOVED[key]}; delete it"
    if (new := RENAMED.get(key)) is not None:
        return f"; it is called {new!r} now and counts units of input, not recordings"
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def check_keys(values: Any, known: Sequence[str], where: str) -> None:
    """Raise a ConfigError that names the first key of `values` that is not `known`, and the nearest that is."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a mapping; got {values!r}")
    for key in values:
        if key not in known:
            raise ConfigError(f"{where} has the unknown key {key!r}{nearest(str(key), known)}")


@functools.cache
def _adapters(cls: type) -> dict[str, tuple[Any, TypeAdapter[Any]]]:
    hints = typing.get_type_hints(cls, include_extras=True)
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    return {name: (hints[name], TypeAdapter(hints[name], config=STRICT)) for name in names}


def _explain(error: ValidationError, value: Any, hint: Any) -> str:
    """Return the rest of a sentence that begins with the key: the rule, its reason if there is one, and the value."""
    first = error.errors(include_url=False)[0]
    bounds = first.get("ctx", {})
    number = {name: f"{bound:g}" if isinstance(bound, float) else bound for name, bound in bounds.items()}
    match first["type"]:
        case "value_error":
            return str(bounds["error"])
        case "literal_error":
            known = [choice for choice in typing.get_args(_literal(hint)) if isinstance(choice, str)]
            return f"is {first['input']!r}{nearest(str(first['input']), known)}"
        case "greater_than":
            rule = f"must be above {number['gt']}"
        case "greater_than_equal":
            rule = "must not be below 0" if bounds["ge"] == 0 else f"must be at least {number['ge']}"
        case "less_than":
            rule = f"must be below {number['lt']}"
        case "less_than_equal":
            rule = f"must be at most {number['le']}"
        case "multiple_of":
            rule = f"must be a multiple of {number['multiple_of']}"
        case "finite_number":
            return f"must be a finite number; got {value}"
        case _:
            return _explain_type(value, hint)
    reasons = [part.description for part in _walk(hint) if isinstance(part, FieldInfo) and part.description]
    return f"{rule}{''.join(f' ({reason})' for reason in reasons)}; got {value}"


def _explain_type(value: Any, hint: Any) -> str:
    kinds = [part for part in _walk(hint) if isinstance(part, type | types.GenericAlias) and part is not type(None)]
    kind = kinds[0] if kinds else str  # a Literal alone
    got = f"got {value!r} ({type(value).__name__})"
    if typing.get_origin(kind) is not tuple:
        return f"must be of type {getattr(kind, '__name__', kind)}; {got}"
    args = typing.get_args(kind)
    inner = next((part for part in _walk(args[0]) if isinstance(part, type)), str)
    size = "" if args[-1] is Ellipsis else f"{len(args)} "
    way_out = f"; write [{value}]" if isinstance(value, inner) and args[-1] is Ellipsis else ""
    return f"must be a list of {size}{inner.__name__}; {got}{way_out}"


def _walk(hint: Any) -> list[Any]:
    """A hint and what it is made of, outermost first: members of unions, and annotated types with their metadata."""
    if typing.get_origin(hint) is Annotated:
        return [*_walk(hint.__origin__), *(part for item in hint.__metadata__ for part in _walk(item))]
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return [part for arg in typing.get_args(hint) for part in _walk(arg)]
    return [hint]


def _literal(hint: Any) -> Any:
    """The `Literal` in a hint, or in the members of its tuple."""
    parts = _walk(hint)
    parts += [inner for part in parts if typing.get_origin(part) is tuple for inner in _walk(typing.get_args(part)[0])]
    return next(part for part in parts if typing.get_origin(part) is typing.Literal)
