"""What this machine decides: threads and folders; and names from other people's files as safe text."""

from __future__ import annotations

import os
import re
import shlex
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path

from jepa_cache.config.parsing import ConfigError

# C0 and C1 controls, what turns the direction of writing around, and the surrogates of names that are not UTF-8: in a
# name from other people's files such a character can move the cursor or forge a line.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def default_num_threads() -> int:
    """Torch threads of one process: half the cores, at least one; a function of the core count alone.

    On a busy two-core machine two threads were 6 to 20 times slower than one: they spin at every barrier.
    """
    return max(1, (os.cpu_count() or 1) // 2)


def default_num_decoders() -> int:
    """Decoding threads of one process: the cores that it may run on, at least two so that one decodes while another waits for the disk."""
    return max(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def require(module: str, extra: str, what: str) -> None:
    """Refuse, with what to type, where a library is missing that an extra of pyproject.toml brings; `what` is the one that needs it."""
    if find_spec(module) is None:
        needs = (text.partition(";") for text in requires("jepa-cache") or ())
        packages = [
            shlex.quote(name.strip()) for name, _, marker in needs if re.search(rf"extra == .{extra}\b", marker)
        ]
        # A checkout that is newer than its install lacks it there.
        packages = packages or [f"--editable '.[{extra}]'"]
        raise ConfigError(
            f"{what} needs the library {module}, which is not installed: python -m pip install {' '.join(packages)}"
        )


def state_folder() -> Path:
    """Folder of what this machine remembers: $XDG_STATE_HOME/jepa-cache, else ~/.local/state/jepa-cache."""
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "jepa-cache"


def weights_folder() -> Path:
    """Folder of encoder weights that were downloaded: below $XDG_CACHE_HOME, else below ~/.cache; shared by all checkouts."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jepa-cache/weights"


def spell_name(name: str) -> str:
    r"""A name of a file or member as text that can be stored: bytes that are no UTF-8 (Latin-1 names, say) as \xe9.

    Python holds such bytes as lone surrogates, which neither Parquet nor SQLite nor a terminal takes.
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def printable(text: str, *, keep: str = "") -> str:
    r"""One line of text with its control characters written out, as `\\x1b` or `\\n`; those in `keep` stay."""
    return CONTROL.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def is_full_gpu(error: RuntimeError) -> bool:
    """Whether an error says that a GPU's memory is full: `torch.OutOfMemoryError`, and what CUDA and cuBLAS say by themselves."""
    return re.search("CUDA.*(out of memory|ALLOC_FAILED)", str(error)) is not None
