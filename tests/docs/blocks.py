"""The commands in README.md and docs/: ```bash blocks, and the lines of transcripts that begin with `$ `."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
NOT_RUN = re.compile(r"^<!-- not run: (.+) -->$")


class Block(NamedTuple):
    """Commands that belong together.

    Attributes:
        page: Path relative to the repository.
        line: Of its first command, from 1.
        text: The commands as a shell takes them.
        not_run: Why they are not run, or None.
        transcript: Whether they were cut from a transcript, which shows exit codes other than 0 too.
    """

    page: str
    line: int
    text: str
    not_run: str | None
    transcript: bool

    @property
    def name(self) -> str:
        """Page and line."""
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """One string a command: continuation lines joined, comments and empty lines left out."""
        joined = re.sub(r"\\\n\s*", "", self.text)
        lines = (re.sub(r"(^|\s)#.*$", "", line).strip() for line in joined.splitlines())
        return [line for line in lines if line]


def find_blocks() -> list[Block]:
    """Every block of every page, in reading order."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [block for page in pages for block in _blocks_of(page)]


def _blocks_of(page: Path) -> list[Block]:
    blocks: list[Block] = []
    lines, inside, start, before = page.read_text().splitlines(), None, 0, ""
    for number, line in enumerate(lines, start=1):
        if line.startswith("```"):
            if inside is None:
                inside, start = line[3:].strip(), number
            else:
                body, marker = lines[start : number - 1], NOT_RUN.match(before)
                shown = [text[2:] for text in body if text.startswith("$ ")]
                if inside == "bash" or (not inside and shown):
                    text = "\n".join(body if inside == "bash" else shown)
                    name = str(page.relative_to(ROOT))
                    blocks.append(Block(name, start + 1, text, marker and marker[1], inside != "bash"))
                inside, before = None, ""
        elif inside is None and line.strip():
            before = line.strip()
    return blocks
