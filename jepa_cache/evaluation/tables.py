"""How a measurement leaves its figures behind: rows of a CSV, and a section of metrics.json with intervals over episodes."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jepa_cache.config.schema import EvaluateConfig
from jepa_cache.evaluation.metrics import bootstrap_mean, episode_means
from jepa_cache.files import atomic_file
from jepa_cache.store.recipe import canonical_json

FORMULA = re.compile(r"'*[=+\-@\t\r]")
MEASUREMENTS_FOLDER = "measurements"
"""Folder of the tables of optional measurements below an evaluation's: one DVC out, whatever was asked for."""


def write_table(rows: Sequence[Mapping[str, Any]], path: Path, *, columns: Sequence[str] = ()) -> None:
    """Write rows that share their keys as CSV with one header line, atomically; None is an empty cell. The folder is made.

    Args:
        rows: With the same keys.
        path: Of the file.
        columns: Where there may be no row; else those of the first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns or rows[0]))
        writer.writeheader()
        writer.writerows({name: guard_cell(value) for name, value in row.items()} for row in rows)


def guard_cell(value: Any) -> Any:
    """A text that a spreadsheet would run as a formula, with the `'` before it that makes it a text; all else as it is."""
    if not isinstance(value, str) or not FORMULA.match(value):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def unguard_cell(text: str) -> str:
    """The text that `guard_cell` was given."""
    return text[1:] if text.startswith("'") and FORMULA.match(text) else text


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write JSON with sorted keys, atomically: equal content gives equal bytes. The folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_bytes(canonical_json(content))


def build_section(
    name: str, values: Mapping[str, np.ndarray], episodes: Sequence[str], settings: EvaluateConfig
) -> dict[str, dict[str, Any]]:
    """Means over episodes under `name`, and their 95 % intervals under `<name>_ci`.

    Args:
        name: Of the section in metrics.json.
        values: Figure name to [windows].
        episodes: Key of each window's episode.
        settings: Resamples and seed.

    Raises:
        ValueError: When there are fewer than two episodes.
    """
    estimates = {
        figure: bootstrap_mean(
            episode_means(per_window, episodes), num_resamples=settings.num_bootstrap, seed=settings.seed
        )
        for figure, per_window in values.items()
    }
    return {
        name: {figure: estimate.mean for figure, estimate in estimates.items()},
        f"{name}_ci": {figure: [estimate.low, estimate.high] for figure, estimate in estimates.items()},
    }
