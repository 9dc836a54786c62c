"""Which episodes are held out: decided by a hash of the key, so adding recordings never moves one."""

from __future__ import annotations

import hashlib

TRAIN, VAL = "train", "val"


def split_of(episode: str, *, val_share: float, seed: int) -> str:
    """The split of one episode, independent of all others.

    Args:
        episode: Its key.
        val_share: Expected share of held-out episodes, in [0, 1].
        seed: Another seed draws another split.
    """
    head = hashlib.sha256(f"{seed}/{episode}".encode()).digest()[:8]
    return VAL if int.from_bytes(head, "big") / 2**64 < val_share else TRAIN
