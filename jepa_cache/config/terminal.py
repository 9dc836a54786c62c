"""What may reach a terminal.

Names come from other people's files, and a control character in one can move the cursor or forge a line.
"""

from __future__ import annotations

import re
from typing import TextIO

# C0 and C1 controls, what turns the direction of writing around, and the surrogates of names that are not UTF-8.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, *, keep: str = "") -> str:
    r"""One line of text with its control characters written out, as `\\x1b` or `\\n`; those in `keep` stay."""
    return CONTROL.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


class PrintableOutput:
    """A stdout through which only printable characters, line ends and tabs pass; for a whole command."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text; returns its length, as a stream does."""
        self._stream.write(printable(text, keep="\n\t"))
        return len(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)
