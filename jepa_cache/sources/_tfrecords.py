"""TFRecord files without TensorFlow: records by their framing. Lengths are checked before anything is allocated."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jepa_cache.media.remote import BucketFile
from jepa_cache.media.tar import HEAD_BYTES, describe_stand_in

HEADER_BYTES = 12  # length, 8 bytes little endian, and its checksum, 4 bytes
FOOTER_BYTES = 4  # checksum of the record
# A record is one protobuf message, and no protobuf parser takes more.
MAX_RECORD_BYTES = (1 << 31) - 1
SHARD_NAME = re.compile(r"(?P<dataset>.+)-(?P<split>[^-]+)\.tfrecord-(?P<index>\d{5,})-of-(?P<count>\d{5,})")


class Record(NamedTuple):
    """One record: its place in the file, and its bytes or why it cannot be used."""

    index: int
    data: bytes
    problem: str | None


class ShardName(NamedTuple):
    """What the name of a tfrecord shard says."""

    dataset: str
    split: str
    index: int
    count: int


def parse_shard_name(name: str) -> ShardName | None:
    """Read `<dataset>-<split>.tfrecord-<index>-of-<count>`; None for other names."""
    match = SHARD_NAME.fullmatch(name)
    return ShardName(match["dataset"], match["split"], int(match["index"]), int(match["count"])) if match else None


def iter_records(path: Path | BucketFile) -> Iterator[Record]:
    """Yield the records of a TFRecord file in order, each with its checksums checked.

    A record whose content does not match its checksum is a problem of its own; the next one is found by its length. Where a
    length cannot be trusted (its checksum is wrong, it is beyond the file, or beyond what a record can be) the rest of the
    file is lost: one last problem says so, and is the only one of a file that is no TFRecord file at all.

    Args:
        path: The file, uncompressed.

    Cost: memory for one record.
    """
    with path.open("rb") as file:
        size_bytes = file.seek(0, 2)
        offset, index = 0, 0
        while offset < size_bytes:
            file.seek(offset)
            header = file.read(HEADER_BYTES)
            fault = _find_fault(header, size_bytes - offset)
            if fault is not None:
                if index == 0:
                    file.seek(0)
                    what = describe_stand_in(file.read(HEAD_BYTES)) or f"damaged from its first byte on? ({fault})"
                    yield Record(0, b"", f"the file is no TFRecord file: {what}")
                    return
                rest = f"after record {index - 1} the file is damaged (byte {offset} of {size_bytes}): {fault}"
                yield Record(index, b"", f"{rest}. What follows is lost; fetch the file again")
                return
            (length,) = struct.unpack_from("<Q", header)
            data = file.read(length)
            (stated,) = struct.unpack("<I", file.read(FOOTER_BYTES))
            intact = mask_crc32c(data) == stated
            problem = None if intact else f"record {index} does not match its checksum: the file is damaged there"
            yield Record(index, data if intact else b"", problem)
            offset += HEADER_BYTES + length + FOOTER_BYTES
            index += 1


def copy_first_records(path: Path | BucketFile, most: int, out: Path) -> int | None:
    """Copy the first records of a TFRecord file, as they are; what lies behind them is not read.

    Args:
        path: The file.
        most: How many; fewer where the file is damaged behind its first one.
        out: The new file.

    Returns:
        How many were copied, or None, and no new file, where the file holds no more than `most`, or no record.
    """
    with path.open("rb") as file, out.open("wb") as copy:
        size_bytes = path.stat().st_size
        offset, num_records = 0, 0
        while offset < size_bytes and num_records < most:
            header = file.read(HEADER_BYTES)
            fault = _find_fault(header, size_bytes - offset)
            if fault is not None:
                offset = size_bytes  # iter_records says what is wrong with it.
                break
            (length,) = struct.unpack_from("<Q", header)
            copy.write(header + file.read(length + FOOTER_BYTES))
            offset += HEADER_BYTES + length + FOOTER_BYTES
            num_records += 1
    if offset >= size_bytes:
        out.unlink()
        return None
    return num_records


def mask_crc32c(data: bytes) -> int:
    """TFRecord's checksum: crc32c, rotated right by 15 bits and moved by a constant, as TensorFlow's record writer does."""
    import google_crc32c

    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _find_fault(header: bytes, rest_bytes: int) -> str | None:
    if len(header) < HEADER_BYTES:
        return f"it ends within the length of a record ({len(header)} bytes are left)"
    length, stated = struct.unpack("<QI", header)
    if mask_crc32c(header[:8]) != stated:
        return "the length of a record does not match its checksum"
    if length > MAX_RECORD_BYTES:
        return f"a record states a length of {length} bytes; no record is longer than {MAX_RECORD_BYTES}"
    if HEADER_BYTES + length + FOOTER_BYTES > rest_bytes:
        return (
            f"a record states a length of {length} bytes, but only {rest_bytes - HEADER_BYTES} are left: it was cut off"
        )
    return None
