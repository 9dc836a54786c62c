"""What is chosen from the machine alone."""

from __future__ import annotations

import os


def default_num_threads() -> int:
    """Torch threads of one process: half the cores, at least one; a function of the core count alone.

    On a busy two-core machine two threads were 6 to 20 times slower than one: they spin at every barrier.
    """
    return max(1, (os.cpu_count() or 1) // 2)
