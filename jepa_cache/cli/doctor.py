"""`jepa-cache doctor`: one table that says whether this machine is ready."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from jepa_cache.cli.readiness import MISSING, NOTE, Finding, check_everything
from jepa_cache.config.loading import find_repository, load_config

WIDTH = 110


def doctor(*, as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Say whether this machine is ready, and what to type where it is not; exit code 1 when something needed is missing.

    Args:
        as_json: Print JSON instead of the table.
    """
    root = find_repository(Path.cwd())
    findings, cache_root = [], None
    try:
        cache_root = load_config(root).cache_root
    except ValueError as error:
        findings.append(
            Finding("params.yaml", MISSING, str(error), "correct params.yaml; git diff params.yaml shows changes")
        )
    findings += check_everything(root, cache_root)
    missing = [finding for finding in findings if finding.state == MISSING]
    if as_json:
        print(json.dumps({"ready": not missing, "findings": [finding._asdict() for finding in findings]}, indent=2))
    else:
        print_table(findings)
        notes = sum(finding.state == NOTE for finding in findings)
        print(f"{'not ready' if missing else 'ready'}: {len(missing)} missing, {notes} to know")
    if missing:
        raise typer.Exit(1)


def print_table(findings: list[Finding]) -> None:
    """Print a line per finding, and under it what to type."""
    name_width = max(len(finding.name) for finding in findings)
    indent = " " * (name_width + 10)
    for finding in findings:
        lines = textwrap.wrap(finding.found, WIDTH - len(indent), break_on_hyphens=False) or [""]
        print(f"{finding.name:<{name_width}}  {finding.state:<8}{lines[0]}")
        for line in lines[1:]:
            print(f"{indent}{line}")
        if finding.todo:
            print(f"{indent}-> {finding.todo}")
