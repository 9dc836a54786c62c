"""TFRecord shards and TFDS features without TensorFlow: records by their framing, the wanted features of each, and shard listings."""

from __future__ import annotations

import fnmatch
import functools
import json
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jepa_cache.config.parsing import nearest
from jepa_cache.media.remote import BUCKET_SCHEME, BucketFile, list_files
from jepa_cache.media.tar import HEAD_BYTES, describe_stand_in
from jepa_cache.sources.parsers.untrusted import read_object

HEADER_BYTES = 12  # length, 8 bytes little endian, and its checksum, 4 bytes
FOOTER_BYTES = 4  # checksum of the record
# A record is one protobuf message, and no protobuf parser takes more.
MAX_RECORD_BYTES = (1 << 31) - 1
SHARD_NAME = re.compile(r"(?P<dataset>.+)-(?P<split>[^-]+)\.tfrecord-(?P<index>\d{5,})-of-(?P<count>\d{5,})")


class Record(NamedTuple):
    """One record: its number in the file, and its bytes or why it cannot be used."""

    index: int
    data: bytes
    problem: str | None


class ShardName(NamedTuple):
    """What `<dataset>-<split>.tfrecord-<index>-of-<count>` says."""

    split: str
    index: int
    count: int


def parse_shard_name(name: str) -> ShardName | None:
    """What the name of a tfrecord shard says; None for other names."""
    match = SHARD_NAME.fullmatch(name)
    return ShardName(match["split"], int(match["index"]), int(match["count"])) if match else None


def iter_records(path: Path | BucketFile) -> Iterator[Record]:
    """Yield the records of a TFRecord file in order, each with its checksums checked.

    A record whose content does not match its checksum is a problem of its own; the next one is found by its length.
    Where a length cannot be trusted (its checksum is wrong, it is beyond the file, or beyond what a record can be) the
    rest of the file is lost: one last problem says so, the only one where the file is no (uncompressed) TFRecord file.
    """
    with path.open("rb") as file:
        size_bytes = file.seek(0, 2)
        offset, index = 0, 0
        while offset < size_bytes:
            file.seek(offset)
            header = file.read(HEADER_BYTES)
            fault = _find_fault(header, size_bytes - offset)
            if fault is not None:
                what = f"after record {index - 1} the file is damaged (byte {offset} of {size_bytes}): {fault}. What follows is lost"
                if index == 0:
                    file.seek(0)
                    what = describe_stand_in(file.read(HEAD_BYTES)) or f"damaged from its first byte on? ({fault})"
                    what = f"the file is no TFRecord file: {what}"
                yield Record(index, b"", what)
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
    from numcodecs.checksum32 import CRC32C

    crc = CRC32C.checksum(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _find_fault(header: bytes, rest_bytes: int) -> str | None:
    if len(header) < HEADER_BYTES:
        return f"it is cut off within the length of a record ({len(header)} bytes are left)"
    length, stated = struct.unpack("<QI", header)
    if mask_crc32c(header[:8]) != stated:
        return "the length of a record does not match its checksum"
    if length > MAX_RECORD_BYTES:
        return f"a record states a length of {length} bytes; no record is longer than {MAX_RECORD_BYTES}"
    if HEADER_BYTES + length + FOOTER_BYTES > rest_bytes:
        return f"a record states a length of {length} bytes, but {rest_bytes - HEADER_BYTES} are left: it was cut off"
    return None


MAX_INFO_BYTES = 64 << 20  # of features.json and dataset_info.json; those of DROID are below 1 MB
FEATURES_FILE = "features.json"
INFO_FILE = "dataset_info.json"
STEPS = "steps/"
"""How the paths of features begin that a record holds for each step."""

FEATURE_MODULE = "tensorflow_datasets.core.features."
CLASS_KEYS = ("pythonClassName", "python_class_name", "type")
"""What names a feature's class, the last one in older TFDS versions; a feature that is called "type" holds a dict."""


class Features:
    """The features of one TFDS directory (`names` by their paths), of which some are parsed; pictures are never decoded."""

    def __init__(self, path: Path | BucketFile, wanted: tuple[str, ...], *, optional: tuple[str, ...] = ()) -> None:
        """Read the features.json at `path`, and dataset_info.json beside it.

        Args:
            path: The features.json of a TFDS directory.
            wanted: Features by their paths, e.g. "steps/observation/cartesian_position"; a ValueError names those that
                are not there.
            optional: The same of features that the directory may lack.
        """
        from tensorflow_datasets.core.example_parser import ExampleParserNp

        content, info = (read_object(file, MAX_INFO_BYTES) for file in (path, path.with_name(INFO_FILE)))
        if (foreign := _find_foreign_class(content)) is not None:
            raise ValueError(
                f"{path} names the class {foreign!r}; only TFDS's own ({FEATURE_MODULE}*) are loaded, because loading a class "
                "runs its module"
            )
        try:
            features = _build_features(json.dumps(content, sort_keys=True))
            self._shard_lengths = {
                split["name"]: [int(length) for length in split.get("shardLengths", ())]
                for split in info.get("splits", ())
            }
            if "steps" not in features:
                raise ValueError("it holds no `steps`, hence no episodes")
        except Exception as error:  # tensorflow-datasets lets protobuf, type and key errors through.
            raise ValueError(f"{path} does not describe a TFDS directory of episodes: {error}") from error
        self._features = dict(_list_features(features))
        self.names = tuple(self._features)
        if missing := [name for name in wanted if name not in self.names]:
            raise ValueError(
                f"{path} has no feature {', '.join(map(repr, missing))}. Name its features in source_options, null or [] where it has "
                f"none{nearest(missing[0], self.names)}"
            )
        wanted = (*wanted, *(name for name in optional if name in self.names))
        specs = dict(_flatten(features.get_serialized_info()))
        for name in wanted:
            if (encoding := _encoding(self._features[name])) not in ("none", "bytes"):
                raise ValueError(
                    f"{path}: the feature {name!r} is stored compressed ({encoding}), which is not read: a small file could "
                    "fill the memory"
                )
            if name not in specs:
                raise ValueError(f"{path}: the feature {name!r} changes its shape from step to step, which is not read")
        # Only what is wanted: other features may be compressed, and parsing all of them takes most of the time.
        self._parser = ExampleParserNp({name: specs[name] for name in wanted})

    def count_records(self, split: str, index: int) -> int | None:
        """Records of a shard as dataset_info.json states them; None where it does not."""
        lengths = self._shard_lengths.get(split, ())
        return lengths[index] if index < len(lengths) else None

    def decode(self, data: bytes) -> dict[str, Any]:
        """Parse the wanted features of one record; a ValueError where it does not fit them.

        Returns:
            By path: arrays [T, ...] of the features of `steps`, arrays or single values of the others. Pictures and
            texts are bytes (in an object array [T] where there is one per step).
        """
        try:
            example = dict(self._parser.parse_example(data))
            for name, value in example.items():
                feature = self._features[name]
                if _encoding(feature) == "bytes":  # The numbers of an array are one string of bytes.
                    decode = feature.decode_batch_example_np if name.startswith(STEPS) else feature.decode_example_np
                    example[name] = decode(value)
            return example
        except Exception as error:  # protobuf's DecodeError, KeyError, shape errors: the record decides which.
            raise ValueError(f"the record does not fit features.json: {type(error).__name__}: {error}") from error


def _encoding(feature: Any) -> str:
    return str(getattr(getattr(feature, "_encoding", None), "value", "none"))


# tensorflow-datasets keeps every set of features that ever parsed a record (25 kB); DROID's 2048 shards share one.
@functools.lru_cache(maxsize=16)
def _build_features(text: str) -> Any:
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict.from_json(json.loads(text))


def _find_foreign_class(value: Any) -> str | None:
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            for key in CLASS_KEYS:
                if isinstance(name := item.get(key), str) and not name.startswith(FEATURE_MODULE):
                    return name
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


def _flatten(info: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, inner in info.items():
        if isinstance(inner, Mapping):
            yield from _flatten(inner, f"{prefix}{name}/")
        else:
            yield prefix + name, inner


def list_bucket(given: str) -> list[BucketFile]:
    """The files of a folder in a bucket, or those that its last part names as a glob or brace range."""
    from braceexpand import braceexpand

    if not given.startswith(BUCKET_SCHEME):
        raise ValueError(
            f"{given!r}: of addresses only {BUCKET_SCHEME}bucket/folder is read; copy the directory and give DIR"
        )
    folder, _, last = given.rpartition("/")
    some = parse_shard_name(last) is not None or any(sign in last for sign in "*?[{")
    try:
        files = list_files(folder if some else given)
    except ValueError as error:
        raise ValueError(
            f"{given} cannot be listed: {error}. Is the network reachable, and is it the folder that holds {FEATURES_FILE}? "
            f"Or copy it with `gsutil -m cp -r {given} DIR` and give DIR"
        ) from error
    patterns = list(braceexpand(last)) if some else ["*"]
    return [file for file in files if any(fnmatch.fnmatchcase(file.name, pattern) for pattern in patterns)]
