"""TFRecord files and TFDS directories without TensorFlow: records by their framing, features by features.json.

A data set is not trusted: lengths are checked before anything is allocated, and features.json may only name TFDS's own
feature classes (tensorflow-datasets imports whatever module stands there).
"""

from __future__ import annotations

import functools
import json
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jepa_cache.config.parsing import nearest

HEADER_BYTES = 12  # length, 8 bytes little endian, and its checksum, 4 bytes
FOOTER_BYTES = 4  # checksum of the record
# A record is one protobuf message, and no protobuf parser takes more.
MAX_RECORD_BYTES = (1 << 31) - 1
MAX_INFO_BYTES = 64 << 20  # of features.json and dataset_info.json; those of DROID are below 1 MB
FEATURES_FILE = "features.json"
INFO_FILE = "dataset_info.json"
FEATURE_MODULE = "tensorflow_datasets.core.features."
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


def iter_records(path: Path) -> Iterator[Record]:
    """Yield the records of a TFRecord file in order, each with its checksums checked.

    A record whose content does not match its checksum is a problem of its own; the next one is found by its length. Where a
    length cannot be trusted (its checksum is wrong, it is beyond the file, or beyond what a record can be) the rest of the
    file is lost: one last problem says so.

    Args:
        path: The file, uncompressed.

    Raises:
        ValueError: Not even the first length is one: no TFRecord file.

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
                    raise ValueError(f"{path} is no TFRecord file, or is damaged from its first byte on: {fault}")
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


class Features:
    """The features of one TFDS directory, of which some are decoded and all others are left as they are.

    Owns no open file. Pictures are never decoded: they come as their encoded bytes.
    """

    def __init__(self, folder: Path, wanted: tuple[str, ...], *, optional: tuple[str, ...] = ()) -> None:
        """Read features.json and dataset_info.json.

        Args:
            folder: The TFDS directory; also on gs://, as a path of etils.
            wanted: Features by their paths, e.g. "steps/observation/cartesian_position".
            optional: The same of features that the directory may lack.

        Raises:
            ValueError: The directory is none, names foreign classes, or lacks a wanted feature (the nearest is named).
        """
        import tensorflow_datasets as tfds

        content, info = _read_json(folder / FEATURES_FILE), _read_json(folder / INFO_FILE)
        check_feature_classes(folder / FEATURES_FILE, content)
        try:
            self._features = _build_features(json.dumps(content, sort_keys=True))
            self._shard_lengths = {
                split["name"]: [int(length) for length in split.get("shardLengths", ())]
                for split in info.get("splits", ())
            }
            if "steps" not in self._features:
                raise ValueError("it holds no `steps`, hence no episodes")
        except Exception as error:  # tensorflow-datasets lets protobuf, type and key errors through.
            raise ValueError(f"{folder} cannot be read as a TFDS directory of episodes: {error}") from error
        self._places = dict(_list_features(self._features))
        wanted = (*wanted, *(name for name in optional if name in self._places))
        for name in wanted:
            self._check(folder, name)
        self._decoders: dict[str, Any] = {}
        for name, feature in self._places.items():
            # Unwanted features are not decoded: some hold compressed arrays, and all cost time.
            if name not in wanted or isinstance(feature, tfds.features.Image):
                _put(self._decoders, name, tfds.decode.SkipDecoding())

    @property
    def names(self) -> tuple[str, ...]:
        """All features by their paths."""
        return tuple(self._places)

    def count_records(self, split: str, index: int) -> int | None:
        """Records of a shard as dataset_info.json states them; None where it does not."""
        lengths = self._shard_lengths.get(split, ())
        return lengths[index] if index < len(lengths) else None

    def decode(self, data: bytes) -> dict[str, Any]:
        """Decode one record.

        Returns:
            Nested as features.json says; `steps` is a list.

        Raises:
            ValueError: The record does not fit the features.
        """
        try:
            example = self._features.deserialize_example_np(data, decoders=self._decoders)
            return {**example, "steps": list(example["steps"])}
        except Exception as error:  # protobuf's DecodeError, KeyError, shape errors: the record decides which.
            raise ValueError(f"the record does not fit features.json: {type(error).__name__}: {error}") from error

    def _check(self, folder: Path, name: str) -> None:
        if name not in self._places:
            raise ValueError(
                f"{folder} has no feature {name!r}{nearest(name, list(self._places))}. Name its features in source_options; "
                "null or [] where it has none"
            )
        encoding = getattr(self._places[name], "_encoding", None)
        if str(getattr(encoding, "value", "none")) not in ("none", "bytes"):
            raise ValueError(
                f"{folder}: the feature {name!r} is stored compressed ({encoding}), which is not read: a small file could "
                "fill the memory"
            )


def read_path(example: Mapping[str, Any], name: str) -> Any:
    """The value of a feature in one decoded record or step, by its path."""
    value: Any = example
    for part in name.split("/"):
        value = value[part]
    return value


def check_feature_classes(path: Path, content: Any) -> None:
    """Refuse features that are of classes other than TFDS's own, before tensorflow-datasets imports them.

    Args:
        path: The features.json, for the message.
        content: What it holds.

    Raises:
        ValueError: It names a foreign class.
    """
    foreign = _find_foreign_class(content)
    if foreign is not None:
        raise ValueError(
            f"{path} names the class {foreign!r}; only TFDS's own ({FEATURE_MODULE}*) are loaded, because loading a class "
            "runs its module"
        )


# tensorflow-datasets keeps every set of features that ever parsed a record (25 kB); DROID's 2048 shards share one.
@functools.lru_cache(maxsize=16)
def _build_features(text: str) -> Any:
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict.from_json(json.loads(text))


def _read_json(path: Path) -> Any:
    if not path.exists():
        raise ValueError(f"{path.parent} is no TFDS directory: it has no {path.name}. Name the folder that holds it")
    with path.open("rb") as file:
        content = file.read(MAX_INFO_BYTES + 1)
    if len(content) > MAX_INFO_BYTES:
        raise ValueError(f"{path} is larger than {MAX_INFO_BYTES} bytes")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON that can be read: {error}") from error


def _find_foreign_class(value: Any) -> str | None:
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            for key, inner in item.items():
                # The last is the form of older TFDS versions; a feature that is called "type" holds a dict.
                named = key in ("pythonClassName", "python_class_name", "type") and isinstance(inner, str)
                if named and not inner.startswith(FEATURE_MODULE):
                    return inner
            todo += item.values()
        elif isinstance(item, list):
            todo += item
    return None


def _list_features(features: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, feature) of every leaf; the sequence of steps adds no part to the path."""
    import tensorflow_datasets as tfds

    for name, feature in features.items():
        inner = feature.feature if isinstance(feature, tfds.features.Dataset | tfds.features.Sequence) else feature
        if isinstance(inner, tfds.features.FeaturesDict):
            yield from _list_features(inner, f"{prefix}{name}/")
        else:
            yield prefix + name, feature


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    *folders, last = name.split("/")
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[last] = value
