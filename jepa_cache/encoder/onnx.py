"""The weights in an ONNX file, read without the onnx package: its protobuf framing, of which only tensors are looked at.

Nothing of the graph is run. The file may come from anywhere: lengths, shapes and types are checked before they are used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Protobuf's wire types; groups (3 and 4) are not used by ONNX."""
GRAPH = 7  # of a ModelProto
INITIALIZER = 5  # of a GraphProto
DIMS, DATA_TYPE, NAME, RAW_DATA, EXTERNAL_DATA = 1, 2, 8, 9, 13  # of a TensorProto
FLOAT = 1  # a DATA_TYPE
MAX_DIMS = 8


class OnnxError(ValueError):
    """Bytes that are no ONNX model of float32 weights; the message says why."""


def iter_weights(content: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """Every float32 initialiser of a model in the order of the file, as (name, read-only array); other types are left out.

    Raises:
        OnnxError: The bytes end early, are no protobuf, or a tensor's values are not as many as its shape says, or lie elsewhere.
    """
    for graph in _iter_messages(memoryview(content), GRAPH):
        for tensor in _iter_messages(graph, INITIALIZER):
            if (weight := _read_tensor(tensor)) is not None:
                yield weight


def _read_tensor(tensor: memoryview) -> tuple[str, np.ndarray] | None:
    shape: list[int] = []
    name, data_type, raw, external = "", 0, None, False
    for field, value in _iter_fields(tensor):
        if field == DIMS and isinstance(value, int):
            shape.append(value)
        elif field == DIMS and isinstance(value, memoryview):  # packed
            at = 0
            while at < len(value):
                size, at = _read_varint(value, at)
                shape.append(size)
        elif field == DATA_TYPE and isinstance(value, int):
            data_type = value
        elif field == NAME and isinstance(value, memoryview):
            name = bytes(value).decode("utf-8", errors="replace")
        elif field == RAW_DATA and isinstance(value, memoryview):
            raw = value
        external |= field == EXTERNAL_DATA
    if data_type != FLOAT:
        return None
    if raw is None or external:
        raise OnnxError(f"the values of tensor {name!r} are not in the file as raw bytes")
    if len(shape) > MAX_DIMS or 4 * math.prod(shape) != len(raw):
        raise OnnxError(f"tensor {name!r} has shape {shape} but {len(raw)} bytes of float32")
    return name, np.frombuffer(raw, "<f4").reshape(shape)


def _iter_messages(message: memoryview, wanted: int) -> Iterator[memoryview]:
    for field, value in _iter_fields(message):
        if field == wanted:
            if not isinstance(value, memoryview):
                raise OnnxError(f"field {field} is a number where a message was expected; this is no ONNX model")
            yield value


def _iter_fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Every field of a message: its number with an int, or with the bytes of what is text, packed numbers or a message."""
    at = 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        field, wire_type = tag >> 3, tag & 7
        if wire_type == VARINT:
            value, at = _read_varint(message, at)
            yield field, value
            continue
        size = {FIXED64: 8, FIXED32: 4}.get(wire_type)
        if wire_type == BYTES:
            size, at = _read_varint(message, at)
        if size is None or field == 0:
            raise OnnxError(f"wire type {wire_type} of field {field} is not known; this is no ONNX model")
        if size > len(message) - at:
            raise OnnxError(
                f"field {field} has {size} bytes, of which {len(message) - at} are there; the file ends early"
            )
        yield field, message[at : at + size]
        at += size


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number at a place, seven bits a byte with the lowest first, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise OnnxError("the file ends early, within a number")
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
    raise OnnxError("a number has more than ten bytes; this is no ONNX model")
