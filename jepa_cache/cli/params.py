"""`jepa-cache params`: every resolved setting and where its value comes from."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated

import typer

from jepa_cache.config.loading import find_repository, load_config
from jepa_cache.config.schema import Config


def params(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as train.lr=3e-4")] = None,
) -> None:
    """Print the resolved settings and where each comes from."""
    config = load_config(find_repository(Path.cwd()), overrides or [])
    rows = [
        (key, repr(value) if isinstance(value, str) else str(value), config.origins.get(key, ""))
        for key, value in flatten(config)
    ]
    key_width = max(len(key) for key, _, _ in rows)
    for key, value, origin in rows:
        print(f"{key:<{key_width}}  {value:<40}  {origin}")


def flatten(config: Config) -> list[tuple[str, object]]:
    """Dotted names and values of all settings, in the order of params.yaml."""
    rows: list[tuple[str, object]] = []
    for section, values in vars(config).items():
        if is_dataclass(values):
            for key, value in asdict(values).items():
                nested = value.items() if isinstance(value, dict) else []
                rows += [(f"{section}.{key}.{inner}", x) for inner, x in nested] or [(f"{section}.{key}", value)]
        elif section == "cache_root":
            rows += [("cache.root", values), ("cache.verify_checksums", config.verify_checksums)]
    return rows
