"""How damage in the cache is reported: what, where, and what to type next."""

from __future__ import annotations

WAY_OUT = (
    "run `jepa-cache repair`, which encodes just this unit again (or delete the store's folder and run "
    "`python stages/encode.py`)"
)


class StoreDamagedError(ValueError):
    """A store that does not hold what it should; the message names the place and what to type next."""
