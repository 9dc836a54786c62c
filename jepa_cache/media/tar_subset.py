"""The first samples of a tar shard, without reading the rest of it."""

from __future__ import annotations

import contextlib
import tarfile
from collections.abc import Collection
from pathlib import Path

from jepa_cache.media.tar import BLOCK_BYTES, READ_BYTES, find_end, find_key, iter_headers, open_headers


def copy_first_samples(path: Path, suffixes: Collection[str], most: int, out: Path) -> int | None:
    """Copy the members of the first samples of a tar shard into a tar of their own, as they are.

    Headers are read until the next sample begins and these are complete; of what lies behind, nothing is.

    Args:
        path: The tar shard.
        suffixes: As in `iter_samples`; a sample with all of them is complete.
        most: How many.
        out: The new tar.

    Returns:
        How many were copied, or None, and no new file, where the tar shard holds no more than `most`, or is damaged.
    """
    found: dict[str, set[str]] = {}
    pieces: list[tuple[int, int]] = []
    more = False
    with path.open("rb") as file:
        # What is wrong with a damaged one is said by iter_samples.
        with contextlib.suppress(tarfile.TarError, ValueError, OverflowError), open_headers(file) as tar:
            for member in iter_headers(tar):
                place = find_key(member, suffixes)
                if place is None:
                    continue
                key, suffix = place
                if key in found or len(found) < most:
                    found.setdefault(key, set()).add(suffix)
                    pieces.append((member.offset, find_end(member)))
                else:
                    more = True
                    if all(given >= set(suffixes) for given in found.values()):
                        break
        if not more:
            return None
        with out.open("wb") as copy:
            for start, stop in pieces:
                file.seek(start)
                while start < stop and (block := file.read(min(READ_BYTES, stop - start))):
                    start += copy.write(block)
            copy.write(bytes(2 * BLOCK_BYTES))
    return len(found)
