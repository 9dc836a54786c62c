"""What a store looks like on the disk: names, shapes and codecs of its arrays, its tables, and store.json, which lists its files.

`tokens` [n, N, D], dimensions step, token, channel; inner chunks of 8 steps in shards of 512, bytes + crc32c, no
compressor: Zarr v3 that zarr-python, xarray, dask and tensorstore read without our code. float16, or as `store.quantisation`
says, then with `token_scales` [n, N], `channel_scales` [D] and `channel_means` [D] beside it. In the same group lie
`steps.parquet`, `segments.parquet` and `store.json`. docs/store_format.md tells everything that another program needs.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from jepa_cache.store.quantisation import Channels, get_codec, scales_dtype, scales_shape
from jepa_cache.store.recipe import canonical_json, file_digest, fingerprint, inner_path

if TYPE_CHECKING:
    import zarr

FORMAT_VERSION = 1
CHUNK_STEPS = 8
SHARD_STEPS = 512
TOKENS = "tokens"
TOKEN_SCALES = "token_scales"
CHANNEL_SCALES = "channel_scales"
CHANNEL_MEANS = "channel_means"
SCALE_ARRAYS = (TOKEN_SCALES, CHANNEL_SCALES, CHANNEL_MEANS)
STEPS_FILE = "steps.parquet"
SEGMENTS_FILE = "segments.parquet"
STORE_FILE = "store.json"
SELF_DIGEST = "sha256"  # of store.json itself, without this entry
# Sorted behind "provenance", which the first release expects right after the content.
IDENTITY = "published_as"
REMEDY = "run `jepa-cache verify --repair`, which makes just this again from its recordings"

# One row per step (row of `tokens`). What stage-two filters need, so that they never touch the video again.
STEPS_SCHEMA = pa.schema(
    [
        pa.field("segment", pa.int32()),
        pa.field("frame", pa.int64()),  # index in the video of the step's anchor frame
        pa.field("tick", pa.int64()),  # row of the episode's controls at the anchor
        pa.field("gui", pa.bool_()),  # a screen was open at the anchor
        pa.field(
            "idle", pa.float32()
        ),  # share of the ticks from this anchor to the next without any control; NaN at the end
        pa.field("luma_mean", pa.float32()),  # of the anchor frame, 0 to 255
        pa.field("luma_std", pa.float32()),
    ]
)

# One row per segment: a contiguous run of steps [start, stop) from which windows may be drawn.
SEGMENTS_SCHEMA = pa.schema(
    [
        pa.field("segment", pa.int32()),
        pa.field("episode", pa.string()),
        pa.field("start", pa.int64()),
        pa.field("stop", pa.int64()),
        pa.field("step_hz", pa.float64()),
    ]
)


class StoreDamagedError(ValueError):
    """A store does not hold what it should; the message names the path and what to type next."""


class FileRecord(NamedTuple):
    """Size and sha256 of one file of a store."""

    num_bytes: int
    sha256: str


class StoreFile(NamedTuple):
    """What store.json says.

    Attributes:
        metadata: Describes the content.
        digest: Covers metadata and files.
        provenance: How it was made.
        files: Every other file by its path in the store.
        crc32c: Of each sharded array the checksums of its chunks: a text for each shard, 8 hexadecimal digits a chunk. So a chunk is
            known to be this store's own without reading all of its file. Empty in stores that were made before it was listed.
        published_as: Fingerprint and unit that it was published as. None in stores of the first release.
    """

    metadata: dict[str, Any]
    digest: str
    provenance: dict[str, Any]
    files: dict[str, FileRecord]
    crc32c: dict[str, list[str]]
    published_as: str | None

    @property
    def num_bytes(self) -> int:
        """Of all files but store.json."""
        return sum(file.num_bytes for file in self.files.values())


def write_store_file(
    folder: Path,
    final: Path,
    metadata: Mapping[str, Any],
    provenance: Mapping[str, Any],
    crc32c: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Write store.json of a finished store that is not published yet: every file with its size and sha256.

    Args:
        folder: The store.
        final: Where it will be published.
        metadata: Describes the content; part of the store's digest.
        provenance: How it was made; recorded, not part of the digest.
        crc32c: Checksums of the chunks of its sharded arrays, as `shards.list_checksums` gives them; None where it has none.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listing = {
        str(path.relative_to(folder)): {"num_bytes": path.stat().st_size, "sha256": file_digest(path)} for path in files
    }
    content = {"format_version": FORMAT_VERSION, "card": dict(metadata), "files": listing}
    document = {"content": content, "provenance": dict(provenance), IDENTITY: _identity(final)}
    if crc32c is not None:
        document["crc32c"] = {name: list(texts) for name, texts in crc32c.items()}
    (folder / STORE_FILE).write_bytes(canonical_json({**document, SELF_DIGEST: _digest(document)}))


def read_store_file(store: Path) -> StoreFile:
    """Read store.json of a published store.

    Raises:
        StoreDamagedError: When it is missing or no valid JSON.
        ValueError: When another version of the program wrote the store.
    """
    raw, document = _read_document(store)
    if document["content"]["format_version"] != FORMAT_VERSION:
        # Not damaged: another version of this program wrote it, and nobody asked to replace it.
        raise ValueError(
            f"{store} has store format {document['content']['format_version']}, this program reads {FORMAT_VERSION}; "
            "set cache.root to another folder, or delete this one"
        )
    if not _is_as_written(raw, document):
        raise StoreDamagedError(f"{store / STORE_FILE} has changed since it was written (sha256 differs); {REMEDY}")
    try:
        content = document["content"]
        return StoreFile(
            metadata=dict(content["card"]),
            digest=_digest_text(raw) or _digest(content),
            provenance=dict(document["provenance"]),
            files={inner_path(name): FileRecord(**entry) for name, entry in content["files"].items()},
            crc32c=dict(document.get("crc32c", {})),
            published_as=document.get(IDENTITY),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreDamagedError(f"{store / STORE_FILE} is damaged ({error!r}); {REMEDY}") from error


def check_identity(store: Path, found: StoreFile) -> StoreFile:
    """Check that a store is the one that its path names, by its recipe and its unit.

    A store of the first release does not say of which unit it is, and its actions not even of which recipe: there
    `jepa-cache verify` compares with the controls of the unit, which do.

    Args:
        store: A published store.
        found: What its store.json says; also returned.

    Raises:
        StoreDamagedError: It is another recipe's or unit's store: it was copied, or a folder renamed.
    """
    recipe = found.metadata.get("recipe")
    of_recipe = store.parent.name if recipe is None else _hash_recipe(json.dumps(recipe, sort_keys=True))
    identity = found.published_as or f"{of_recipe}/{store.stem}"
    if identity != _identity(store) or of_recipe != store.parent.name:
        raise StoreDamagedError(
            f"{store} is not the store that its path says but that of {identity} (recipe/unit): it was copied, or a folder was renamed. "
            f"Move it back, or {REMEDY}"
        )
    return found


def is_misread_version(store: Path, digest: str) -> bool:
    """Whether a store of this digest has another format version only because that number was damaged.

    Raises:
        StoreDamagedError: When store.json is missing or no valid JSON.
    """
    return _digest({**_read_document(store)[1]["content"], "format_version": FORMAT_VERSION}) == digest


@functools.lru_cache(maxsize=256)
def _hash_recipe(text: str) -> str:
    return fingerprint(json.loads(text))  # thirty times as long as spelling it; thousands of stores share one


def _identity(store: Path) -> str:
    return f"{store.parent.name}/{store.stem}"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(content)).hexdigest()


def _is_as_written(raw: bytes, document: Mapping[str, Any]) -> bool:
    """Whether store.json is what its own sha256, its last entry, says; stores made before there was one have none."""
    if document.keys() == {"content", "provenance"}:
        return True
    end = raw.rfind(b',\n  "%s": ' % SELF_DIGEST.encode())
    digest = hashlib.sha256(raw[:end] + b"\n}\n").hexdigest()
    return raw[end:] == b',\n  "%s": "%s"\n}\n' % (SELF_DIGEST.encode(), digest.encode())


def _digest_text(raw: bytes) -> str | None:
    """The digest without spelling the content anew, which costs ten times as much; None when the file is not as it was written.

    In the canonical spelling the content stands in store.json as it would stand alone, but for two spaces before every line.
    """
    head, tail = b'{\n  "content": ', re.search(rb',\n  "(crc32c|provenance)": ', raw)
    if not raw.startswith(head) or tail is None:
        return None
    return hashlib.sha256(raw[len(head) : tail.start()].replace(b"\n  ", b"\n") + b"\n").hexdigest()


def check_store(store: Path, *, read_data: bool = False) -> StoreFile:
    """Check that every file of a store is there with its size, and with `read_data` that its bytes are unchanged.

    Cost: one stat per file (a zarr shard is 512 steps); with `read_data` it reads everything.

    Raises:
        StoreDamagedError: Naming the first file that is missing or differs.
    """
    found, folder = read_store_file(store), os.fspath(store)
    for name, file in found.files.items():
        check_size(f"{folder}/{name}", file.num_bytes)
        if read_data:
            check_content(store / name, file.sha256)
    return found


def check_size(path: Path | str, num_bytes: int) -> None:
    """Check that a file is there with its size.

    Raises:
        StoreDamagedError: It is not.
    """
    try:
        found = os.stat(path)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreDamagedError(f"{path} is missing; {REMEDY}") from error
    if not stat.S_ISREG(found.st_mode):
        raise StoreDamagedError(f"{path} is no file; {REMEDY}")
    if found.st_size != num_bytes:
        raise StoreDamagedError(f"{path} has {found.st_size} bytes, not {num_bytes}; {REMEDY}")


def read_content(path: Path, sha256: str) -> bytes:
    """The bytes of a small file, which are those that were written.

    Raises:
        OSError: It is missing, or the disk cannot read it.
        StoreDamagedError: It has changed.
    """
    raw = path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise StoreDamagedError(f"{path} has changed since it was written (sha256 differs); {REMEDY}")
    return raw


def check_content(path: Path, sha256: str) -> None:
    """Check that a file holds what was written. Cost: reads it.

    Raises:
        StoreDamagedError: It does not, or the disk cannot read it.
    """
    try:
        found = file_digest(path)
    except OSError as error:
        raise StoreDamagedError(f"{path} cannot be read ({error}); {REMEDY}") from error
    if found != sha256:
        raise StoreDamagedError(f"{path} has changed since it was written (sha256 differs); {REMEDY}")


def _read_document(store: Path) -> tuple[bytes, dict[str, Any]]:
    path = store / STORE_FILE
    try:
        raw = path.read_bytes()
        document = json.loads(raw)
        document["content"]["format_version"]
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise StoreDamagedError(f"{path} is missing; {REMEDY}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StoreDamagedError(f"{path} is damaged ({error}); {REMEDY}") from error
    return raw, document


def shard_path(store: Path, shard: int) -> Path:
    """File of zarr shard number `shard` of the tokens array (Zarr's default chunk key encoding)."""
    return store / TOKENS / "c" / str(shard) / "0" / "0"


def create_tokens_array(store: Path, num_tokens: int, width: int, dtype: str = "float16") -> zarr.Array:
    """An empty tokens array in a new group at `store`, stored as `quantisation` says; it grows by resizing."""
    import zarr

    scheme = get_codec(dtype)
    zarr.create_group(store, zarr_format=3, overwrite=False)
    shape = (0, num_tokens, width // scheme.codes_per_item)
    last = "channel" if scheme.codes_per_item == 1 else "byte"
    attributes = {} if scheme.meaning is None else {"scheme": dtype, "meaning": scheme.meaning}
    return _create_array(store, TOKENS, shape, ("step", "token", last), scheme.dtype, scheme.fill_value, attributes)


def create_token_scales(store: Path, num_steps: int, num_tokens: int, width: int, dtype: str) -> zarr.Array:
    """The array of token scales beside the tokens."""
    shape = scales_shape(dtype, num_steps, num_tokens, width)
    dimensions = ("step", "token", "group")[: len(shape)]
    return _create_array(store, TOKEN_SCALES, shape, dimensions, scales_dtype(dtype).name, float("nan"))


def write_channels(store: Path, channels: Channels) -> None:
    """Write the channels' scales and means beside the tokens, each as one chunk of one shard."""
    for name, values in ((CHANNEL_SCALES, channels.scales), (CHANNEL_MEANS, channels.means)):
        rows = len(values)
        array = _create_array(
            store, name, values.shape, ("channel",), "float32", float("nan"), chunk_rows=rows, shard_rows=rows
        )
        array[...] = values


def _create_array(
    store: Path,
    name: str,
    shape: tuple[int, ...],
    dimensions: tuple[str, ...],
    dtype: str,
    fill_value: float,
    attributes: Mapping[str, str] | None = None,
    *,
    chunk_rows: int = CHUNK_STEPS,
    shard_rows: int = SHARD_STEPS,
) -> zarr.Array:
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec

    return zarr.open_group(store, mode="r+").create_array(
        name,
        shape=shape,
        chunks=(chunk_rows, *shape[1:]),
        shards=(shard_rows, *shape[1:]),
        dtype=dtype,
        serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        fill_value=fill_value,
        dimension_names=dimensions,
        attributes=dict(attributes or {}),
    )
