"""Which of the missing units this process encodes, when several encoders work on one cache root."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jepa_cache.files import Claim
from jepa_cache.sources import Unit
from jepa_cache.store.layout import StoreDamagedError
from jepa_cache.store.root import CacheRoot

POLL_S = 1.0


class Claims:
    """The units that this process has taken under one recipe, each until its store is there.

    The lock of a process that dies is let go by the kernel, so its units can be taken at once; what it had not published
    is lost, at most one unit.

    Attributes:
        busy: Units that another encoder held when it was their turn.
        num_taken: Units handed out.
    """

    def __init__(self, root: CacheRoot, fingerprint: str) -> None:
        self.busy: list[tuple[Unit, str]] = []
        self.num_taken = 0
        self._root, self._fingerprint = root, fingerprint
        self._held: dict[Path, Claim] = {}

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: Any) -> None:
        with ExitStack() as stack:  # all of them, also when the file of one cannot be removed
            for claim in self._held.values():
                stack.callback(claim.release)
        self._held.clear()

    def take(self, units: Sequence[tuple[Unit, str]]) -> Iterator[tuple[Unit, str]]:
        """Claim one unit after the other, leaving out those that others hold or have finished meanwhile.

        A store that is there but not whole is removed, by name, once its unit is ours.
        """
        for unit, digest in units:
            for store in [store for store in self._held if store.is_dir()]:  # published since we were here
                self._held.pop(store).release()
            store = self._root.tokens(self._fingerprint, digest)
            if is_whole(self._root, store):  # its maker may be holding the claim still
                continue
            claim = self._root.claim(store)
            if claim is None:
                self.busy.append((unit, digest))
                continue
            self._held[store] = claim
            if not remove_damaged(self._root, store, "encoding"):
                self.num_taken += 1
                yield unit, digest


def is_whole(root: CacheRoot, store: Path) -> bool:
    """Whether a store is published in its place with all its files. Cost: one stat per file."""
    try:
        return root.find_store(store) is not None
    except StoreDamagedError:
        return False


def remove_damaged(root: CacheRoot, store: Path, what: str) -> bool:
    """Whether a store is there and whole; a damaged one is named and removed. Only for who has claimed it.

    Args:
        root: Cache root.
        store: The store.
        what: What comes next, for the message: "encoding" it again.
    """
    try:
        return root.find_store(store) is not None
    except StoreDamagedError as error:
        print(f"damaged, {what} it again: {error}")
        root.remove(store)
        return False


def wait_for_others(root: CacheRoot, stores: Sequence[tuple[str, Path]], on_wait: Callable[[str], None]) -> None:
    """Wait until one of the stores that others are making is published, or its maker is gone.

    Args:
        root: Cache root.
        stores: Names of the units, and where their stores will lie.
        on_wait: Is told, again and again, for which unit.
    """
    while all(root.is_claimed(store) and not is_whole(root, store) for _, store in stores):
        on_wait(stores[0][0])
        time.sleep(POLL_S)
