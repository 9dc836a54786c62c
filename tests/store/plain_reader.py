"""A reader of caches written from docs/store_format.md alone: json, struct, numpy, a crc32c and Parquet. Imports nothing of ours."""

import hashlib
import json
import math
import struct
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from google_crc32c import value as crc32c

MISSING = 2**64 - 1


def check_crc(data, stored):
    assert struct.unpack("<I", stored) == (crc32c(data),), "crc32c differs"


def read_array(folder):
    """The whole array whose zarr.json lies in `folder`."""
    meta = json.loads((folder / "zarr.json").read_text())
    shape, rows = meta["shape"], meta["chunk_grid"]["configuration"]["chunk_shape"][0]
    dtype = np.dtype(meta["data_type"]).newbyteorder("<")
    out = np.empty(shape, dtype)
    for number in range(math.ceil(shape[0] / rows)):
        path = folder.joinpath("c", str(number), *["0"] * (len(shape) - 1))
        part = read_shard(path.read_bytes(), meta, dtype, min(rows, shape[0] - number * rows))
        out[number * rows : number * rows + len(part)] = part
    return out


def read_shard(content, meta, dtype, num_rows):
    rest = meta["shape"][1:]
    if meta["codecs"][0]["name"] != "sharding_indexed":  # one chunk
        assert [codec["name"] for codec in meta["codecs"]] == ["bytes", "crc32c"]
        check_crc(content[:-4], content[-4:])
        return np.frombuffer(content[:-4], dtype).reshape(-1, *rest)[:num_rows]
    chunk_rows = meta["codecs"][0]["configuration"]["chunk_shape"][0]
    num_chunks = meta["chunk_grid"]["configuration"]["chunk_shape"][0] // chunk_rows
    index = content[-16 * num_chunks - 4 : -4]
    check_crc(index, content[-4:])
    parts = []
    for chunk in range(math.ceil(num_rows / chunk_rows)):
        offset, length = struct.unpack_from("<QQ", index, 16 * chunk)
        assert offset != MISSING, f"chunk {chunk} is missing"
        data = content[offset : offset + length - 4]
        check_crc(data, content[offset + length - 4 : offset + length])
        parts.append(np.frombuffer(data, dtype).reshape(chunk_rows, *rest))
    return np.concatenate(parts)[:num_rows]


def read_store_digest(store):
    """(content of store.json, digest of the store), by cutting the text as the document says."""
    text = (store / "store.json").read_text()
    start = text.index('"content": {') + len('"content": ')
    lines = text[start : text.index("\n  },") + len("\n  }")].split("\n")
    content = "\n".join([lines[0], *(line.removeprefix("  ") for line in lines[1:])]) + "\n"
    for name, entry in json.loads(content)["files"].items():
        data = (store / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["num_bytes"], entry["sha256"]), name
    return json.loads(content), hashlib.sha256(content.encode()).hexdigest()


def float8(bits):
    sign, exponent, mantissa = bits >> 7, bits >> 3 & 15, bits & 7
    size = (1 + mantissa / 8) * 2.0 ** (exponent.astype(int) - 7)
    return np.where(exponent == 0, mantissa / 8 * 2.0**-6, size) * np.where(sign, -1, 1)


def to_codes(dtype, stored):
    """Codes [..., D] float32."""
    if dtype == "int4":
        codes = np.empty((*stored.shape[:-1], 2 * stored.shape[-1]), np.float32)
        codes[..., 0::2], codes[..., 1::2] = (stored & 15).astype(int) - 8, (stored >> 4).astype(int) - 8
        return codes
    return (stored if dtype == "int8" else float8(stored)).astype(np.float32)


def formula(codes, token_scales, channel_scales, channel_means):
    """All float32; three operations from left to right."""
    return codes * token_scales * channel_scales + channel_means


def read_tokens(store):
    """The values [n, N, D] float32 of a token store."""
    dtype = read_store_digest(store)[0]["card"]["recipe"]["dtype"]
    stored = read_array(store / "tokens")
    if dtype == "float16":
        return stored.astype(np.float32)
    if dtype == "bfloat16":
        return np.left_shift(stored, 16, dtype=np.uint32).view(np.float32)
    scales = read_array(store / "token_scales").astype(np.float32)
    scales = scales[:, :, np.arange(stored.shape[-1] * 2) // 64] if dtype == "int4" else scales[:, :, None]
    channels = (read_array(store / name) for name in ("channel_scales", "channel_means"))
    return formula(to_codes(dtype, stored), scales, *channels)


def read_controls_seal(path):
    """(place that the file states, digest that it states, digest of its bytes)."""
    notes, raw = pq.ParquetFile(path).metadata.metadata, path.read_bytes()
    stated = notes[b"file_sha256"]
    assert raw.count(stated) == 1
    return notes[b"place"].decode(), stated.decode(), hashlib.sha256(raw.replace(stated, b"0" * 64)).hexdigest()


def check_listed_checksums(store):
    """Compare the checksums at the end of all chunks with those that store.json lists."""
    for name, shards in json.loads((store / "store.json").read_text())["crc32c"].items():
        meta = json.loads((store / name / "zarr.json").read_text())
        num_chunks = meta["chunk_grid"]["configuration"]["chunk_shape"][0]
        num_chunks //= meta["codecs"][0]["configuration"]["chunk_shape"][0]
        for number, listed in enumerate(shards):
            content = store.joinpath(name, "c", str(number), *["0"] * (len(meta["shape"]) - 1)).read_bytes()
            for chunk in range(len(listed) // 8):
                offset, length = struct.unpack_from("<QQ", content, len(content) - 4 - 16 * (num_chunks - chunk))
                assert content[offset + length - 4 : offset + length].hex() == listed[8 * chunk : 8 * chunk + 8]


def read_training_set(root: Path, manifest_path: Path):
    """Every store of a manifest: (tokens, actions, states, segments as rows, steps as columns)."""
    manifest = json.loads(manifest_path.read_text())
    for part in manifest["parts"]:
        for entry in part["entries"]:
            unit = entry["unit_digest"][:32] + ".zarr"
            store = root / "tokens" / part["fingerprint"] / unit
            actions = root / "actions" / part["action_fingerprint"] / unit
            assert read_store_digest(store)[1] == entry["tokens_digest"]
            check_listed_checksums(store)
            assert read_store_digest(actions)[1] == entry["actions_digest"]
            yield (
                read_tokens(store),
                read_array(actions / "actions"),
                read_array(actions / "states"),
                pq.read_table(store / "segments.parquet").to_pylist(),
                pq.read_table(store / "steps.parquet").to_pydict(),
            )
