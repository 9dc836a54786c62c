"""What a store looks like on the disk: names, shapes and codecs of its arrays, its tables, and store.json, which lists its files.

`tokens` [n, N, D], dimensions step, token, channel; inner chunks of 8 steps in shards of 512, bytes + crc32c, no
compressor: Zarr v3 that zarr-python, xarray, dask and tensorstore read without our code. float16, or as `store.quantisation`
says, then with `token_scales` [n, N], `channel_scales` [D] and `channel_means` [D] beside it. In the same group lie
`steps.parquet`, `segments.parquet` and `store.json`. docs/store_format.md says everything that another program needs.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
import pyarrow as pa

from jepa_cache.files import file_digest
from jepa_cache.store.quantisation import Channels, get_codec, scales_dtype, scales_shape
from jepa_cache.store.recipe import canonical_json, fingerprint, inner_path

if TYPE_CHECKING:
    import zarr

FORMAT_VERSION = 1
CHUNK_STEPS = 8
SHARD_STEPS = 512
TOKENS = "tokens"
TOKEN_SCALES = "token_scales"
CHANNEL_SCALES = "channel_scales"
CHANNEL_MEANS = "channel_means"
STEPS_FILE = "steps.parquet"
SEGMENTS_FILE = "segments.parquet"
STORE_FILE = "store.json"
SELF_DIGEST = "sha256"  # of store.json itself, without this entry
# Sorted behind "provenance", which the first release expects right after the content.
IDENTITY = "published_as"
SLOWER = "slower"  # in the provenance: [rate in Hz, stride] of videos whose frames are sampled more seldom than asked
COLUMN_NAMES = "columns"  # in the provenance: what the data set calls actions and states that are only numbered
REMEDY = "run `jepa-cache verify --repair`, which makes just this again from its recordings"

# One row per step (row of `tokens`). What stage-two filters need, so that they never touch the video again.
STEPS_SCHEMA = pa.schema(
    {
        "segment": pa.int32(),
        "frame": pa.int64(),  # index in the video of the step's anchor frame
        "tick": pa.int64(),  # row of the episode's controls at the anchor
        "gui": pa.bool_(),  # a screen was open at the anchor
        "idle": pa.float32(),  # share of the ticks from this anchor to the next without any control; NaN at the end
        "luma_mean": pa.float32(),  # of the anchor frame, 0 to 255
        "luma_std": pa.float32(),
    }
)

# One row per segment: a contiguous run of steps [start, stop) from which windows may be drawn.
SEGMENTS_SCHEMA = pa.schema(
    {"segment": pa.int32(), "episode": pa.string(), "start": pa.int64(), "stop": pa.int64(), "step_hz": pa.float64()}
)

_RECIPES: dict[str, Any] = {}  # of stores that were read, by fingerprint


class StoreDamagedError(ValueError):
    """A store does not hold what it should; the message names the path and what to type next."""


class _OtherVersionError(ValueError):
    """Not damage: another version of this program wrote a store, and nobody asked to replace it."""


class FileRecord(NamedTuple):
    """Size and sha256 of one file of a store."""

    num_bytes: int
    sha256: str


class StoreFile(NamedTuple):
    """What store.json says."""

    metadata: dict[str, Any]  # describes the content
    digest: str  # covers metadata and files
    provenance: dict[str, Any]  # how it was made
    files: dict[str, FileRecord]  # every other file by its path in the store
    # Of each sharded array the checksums of its chunks: a text for each shard, 8 hexadecimal digits a chunk. So a chunk is known to be
    # this store's own without reading all of its file. Empty for actions, which have no shards.
    crc32c: dict[str, list[str]]
    published_as: str | None  # fingerprint and unit; None in stores of the first release

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
    digests: Mapping[str, str] | None = None,
) -> None:
    """Write store.json of a finished store in `folder`, to be published at `final`: every file with its size and sha256.

    The metadata is part of the store's digest, the provenance is not; `crc32c` is what `reader.list_checksums` gives. `digests` are the
    sha256 that are known already, by path in the store; the other files are read.
    """
    known = digests or {}
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    listing = {
        name: {"num_bytes": path.stat().st_size, "sha256": known.get(name) or file_digest(path)}
        for name, path in files.items()
    }
    content = {"format_version": FORMAT_VERSION, "card": dict(metadata), "files": listing}
    document = {"content": content, "provenance": dict(provenance), IDENTITY: identity_of(final)}
    if crc32c is not None:
        document["crc32c"] = {name: list(texts) for name, texts in crc32c.items()}
    digest = hashlib.sha256(canonical_json(document)).hexdigest()
    (folder / STORE_FILE).write_bytes(canonical_json({**document, SELF_DIGEST: digest}))


def read_store_file(store: Path) -> StoreFile:
    """Read store.json of a published store.

    Raises:
        StoreDamagedError: It is missing, has changed, or is no valid JSON.
        ValueError: Another version of the program wrote the store.
    """
    path = f"{os.fspath(store)}/{STORE_FILE}"
    try:
        raw = _read_bytes(path)
        document = orjson.loads(raw)
        content = document["content"]
        if content["format_version"] != FORMAT_VERSION:
            raise _OtherVersionError(
                f"{store} has store format {content['format_version']}, this program reads {FORMAT_VERSION}; "
                "set cache.root to another folder, or delete this one"
            )
        if not _is_as_written(raw):
            raise changed_error(path)
        return StoreFile(
            metadata=content["card"],
            digest=_digest_content(raw),
            provenance=document["provenance"],
            files={inner_path(name): FileRecord(**entry) for name, entry in content["files"].items()},
            crc32c=document.get("crc32c", {}),
            published_as=document.get(IDENTITY),
        )
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise StoreDamagedError(f"{path} is missing; {REMEDY}") from error
    except (StoreDamagedError, _OtherVersionError):
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreDamagedError(f"{path} is damaged ({error!r}); {REMEDY}") from error


def check_identity(store: Path, found: StoreFile, digest: str | None = None) -> StoreFile:
    """Raise StoreDamagedError unless a store is the one that its path names, and of the digest that is listed; return `found`.

    A store of the first release does not say of which unit it is, and its actions not even of which recipe: there
    `store.check` compares with the controls of the unit, which do.
    """
    recipe, folder = found.metadata.get("recipe"), store.parent.name
    of_recipe = folder
    # Hashing it costs thirty times as much as comparing it; thousands of stores share one.
    if recipe is not None and _RECIPES.get(folder) != recipe:
        of_recipe = fingerprint(recipe)
        _RECIPES[of_recipe] = recipe
    name = identity_of(store)
    identity = found.published_as or f"{of_recipe}/{store.stem}"
    if identity != name or of_recipe != folder:
        raise StoreDamagedError(
            f"{store} is not the store that its path says but that of {identity} (recipe/unit): it was copied, or a folder was renamed. "
            f"Move it back, or {REMEDY}"
        )
    if digest not in (None, found.digest):
        raise StoreDamagedError(
            f"{store} is not the store that the manifest lists: its digest differs; `python stages/encode.py` lists what is there, or "
            f"{REMEDY}"
        )
    return found


def identity_of(path: Path) -> str:
    """<fingerprint>/<unit>, by which a store or file says whose it is, also when it was copied elsewhere."""
    return f"{path.parent.name}/{path.stem}"


def _is_as_written(raw: bytes) -> bool:
    """Whether store.json is what its own sha256, its last entry, says."""
    end = raw.rfind(b',\n  "%s": ' % SELF_DIGEST.encode())
    digest = hashlib.sha256(raw[:end] + b"\n}\n").hexdigest()
    return raw[end:] == b',\n  "%s": "%s"\n}\n' % (SELF_DIGEST.encode(), digest.encode())


def _digest_content(raw: bytes) -> str:
    """The store's digest, without spelling the content anew, which costs ten times as much.

    In a store.json the content stands as it would stand alone, but for two spaces before every line.
    """
    start = len(b'{\n  "content": ')
    end = max(raw.find(b',\n  "crc32c": '), 0) or raw.find(b',\n  "provenance": ')
    return hashlib.sha256(raw[start:end].replace(b"\n  ", b"\n") + b"\n").hexdigest()


def check_store(store: Path, *, read_data: bool = False) -> StoreFile:
    """Raise StoreDamagedError unless every file of a store has its size (one stat each), and with `read_data` its bytes."""
    found, folder = read_store_file(store), os.fspath(store)
    for name, file in found.files.items():
        check_size(f"{folder}/{name}", file.num_bytes)
        if read_data:
            check_content(store / name, file.sha256)
    return found


def check_size(path: Path | str, num_bytes: int) -> None:
    """Raise StoreDamagedError unless a file is there with its size."""
    try:
        found = os.stat(path)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreDamagedError(f"{path} is missing; {REMEDY}") from error
    if not stat.S_ISREG(found.st_mode):
        raise StoreDamagedError(f"{path} is no file; {REMEDY}")
    if found.st_size != num_bytes:
        raise StoreDamagedError(f"{path} has {found.st_size} bytes, not {num_bytes}; {REMEDY}")


def _read_bytes(path: Path | str) -> bytes:
    # Making a Path costs as much as opening the file, and a data set may be ten thousand stores.
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # a link to a device would be read without end
            raise StoreDamagedError(f"{path} is no file; {REMEDY}")
        return file.read()


def read_content(path: Path | str, sha256: str) -> bytes:
    """The bytes of a small file; raises StoreDamagedError where they are not those that were written."""
    raw = _read_bytes(path)
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise changed_error(path)
    return raw


def check_content(path: Path, sha256: str) -> None:
    """Raise StoreDamagedError unless a file holds what was written. Cost: reads it."""
    try:
        if file_digest(path) != sha256:
            raise changed_error(path)
    except OSError as error:
        raise StoreDamagedError(f"{path} cannot be read ({error}); {REMEDY}") from error


def changed_error(path: Path | str) -> StoreDamagedError:
    """For a file that is not what was written."""
    return StoreDamagedError(f"{path} has changed since it was written (sha256 differs); {REMEDY}")


def shard_path(store: Path, shard: int, name: str = TOKENS, num_dimensions: int = 3) -> Path:
    """File of one shard of an array that is cut along its first axis only (Zarr's default chunk keys)."""
    return store.joinpath(name, "c", str(shard), *["0"] * (num_dimensions - 1))


def create_tokens_array(store: Path, num_tokens: int, width: int, dtype: str = "float16") -> zarr.Array:
    """An empty tokens array in a new group at `store`, stored as `quantisation` says; it grows by resizing."""
    import zarr

    codec = get_codec(dtype)
    zarr.create_group(store, zarr_format=3, overwrite=False)
    shape = (0, num_tokens, width // codec.codes_per_item)
    dimensions = ("step", "token", "channel" if codec.codes_per_item == 1 else "byte")
    attributes = {} if codec.meaning is None else {"scheme": dtype, "meaning": codec.meaning}
    return _create_array(store, TOKENS, shape, dimensions, codec.dtype, codec.fill_value, attributes=attributes)


def create_token_scales(store: Path, num_tokens: int, width: int, dtype: str) -> zarr.Array:
    """An empty array of token scales beside the tokens."""
    shape = scales_shape(dtype, 0, num_tokens, width)
    dimensions = ("step", "token", "group")[: len(shape)]
    return _create_array(store, TOKEN_SCALES, shape, dimensions, scales_dtype(dtype).name, float("nan"))


def write_channels(store: Path, channels: Channels) -> None:
    """Write the channels' scales and means beside the tokens, each as one chunk of one shard."""
    for name, values in ((CHANNEL_SCALES, channels.scales), (CHANNEL_MEANS, channels.means)):
        rows = (len(values), len(values))
        _create_array(store, name, values.shape, ("channel",), "float32", float("nan"), rows=rows)[...] = values


def _create_array(
    store: Path,
    name: str,
    shape: tuple[int, ...],
    dimensions: tuple[str, ...],
    dtype: str,
    fill_value: float,
    *,
    rows: tuple[int, int] = (CHUNK_STEPS, SHARD_STEPS),
    attributes: dict[str, str] | None = None,
) -> zarr.Array:
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec

    return zarr.open_group(store, mode="r+").create_array(
        name,
        shape=shape,
        chunks=(rows[0], *shape[1:]),
        shards=(rows[1], *shape[1:]),
        dtype=dtype,
        serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        fill_value=fill_value,
        dimension_names=dimensions,
        attributes=attributes or {},
    )
