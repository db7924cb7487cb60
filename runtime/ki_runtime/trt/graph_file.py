"""What a graph's ONNX file holds, read without the onnx package, which a robot does not have.

Only the few fields that the build needs, straight from the protobuf encoding: opset, operators, and how many bytes of
weights the graph declares. The files are small, since weights are external.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ki_edge.errors import BundleError
from ki_edge.reading import read_file

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
# Field numbers of onnx.proto
MODEL_GRAPH, MODEL_OPSET = 7, 8
GRAPH_NODE, GRAPH_INITIALIZER = 1, 5
NODE_OPERATOR, NODE_DOMAIN = 4, 7
OPSET_DOMAIN, OPSET_VERSION = 1, 2
TENSOR_DIMS, TENSOR_TYPE, TENSOR_NAME, TENSOR_EXTERNAL = 1, 2, 8, 13
ENTRY_KEY, ENTRY_VALUE = 1, 2
BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16, 21: 4, 22: 4}

MAX_GRAPH = 1 << 30  # bytes of a file; weights are external
MAX_AXES = 32

Value = int | memoryview


@dataclass(frozen=True)
class GraphFile:
    """`operators`: how often each occurs; `weight_bytes`: of all weights at their declared types, shared ones once."""

    opset: int
    operators: Mapping[str, int]
    weight_bytes: int


def read_graph(path: Path) -> GraphFile:
    """Read one ONNX file. BundleError if it is damaged or no ONNX file."""
    try:
        model = list(_fields(memoryview(read_file(path, MAX_GRAPH, BundleError))))
        graph = [field for part in _parts(model, MODEL_GRAPH) for field in _fields(part)]
        opsets = [dict(_fields(part)) for part in _parts(model, MODEL_OPSET)]
        opset = next(entry[OPSET_VERSION] for entry in opsets if not entry.get(OPSET_DOMAIN))
        operators = Counter(_operator(part) for part in _parts(graph, GRAPH_NODE))
        weights = dict(_weight(part) for part in _parts(graph, GRAPH_INITIALIZER))
        if not isinstance(opset, int):
            raise ValueError("its opset is no number")
    except BundleError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, StopIteration) as error:
        raise BundleError(f"{path} is not a readable ONNX graph ({error!r}): copy or export the bundle again") from None
    return GraphFile(opset, dict(operators), sum(weights.values()))


def _operator(node: memoryview) -> str:
    fields = dict(_fields(node))
    domain, name = (_text(fields.get(key, memoryview(b""))).decode() for key in (NODE_DOMAIN, NODE_OPERATOR))
    return f"{domain}.{name}" if domain not in ("", "ai.onnx") else name


def _weight(tensor: memoryview) -> tuple[object, int]:
    """Where the weight lies, so that two uses of one place count once, and its bytes."""
    dims: list[int] = []
    place: dict[bytes, bytes] = {}
    name, bits = b"", 0
    for field, value in _fields(tensor):
        if field == TENSOR_DIMS:
            dims += _varints(value) if isinstance(value, memoryview) else [value]
        elif field == TENSOR_TYPE and isinstance(value, int):
            bits = BITS[value]
        elif isinstance(value, memoryview) and field == TENSOR_NAME:
            name = bytes(value)
        elif isinstance(value, memoryview) and field == TENSOR_EXTERNAL:
            entry = dict(_fields(value))
            place[_text(entry[ENTRY_KEY])] = _text(entry[ENTRY_VALUE])
        if len(dims) > MAX_AXES:
            raise ValueError(f"a weight of more than {MAX_AXES} axes")
    where = (place[b"location"], place.get(b"offset", b"0")) if place else name
    return where, math.ceil(math.prod(dims) * bits / 8)


def _text(value: Value) -> bytes:
    """The bytes of a field that holds some: `bytes` of a number would make as many zeros."""
    if not isinstance(value, memoryview):
        raise ValueError("a number where there should be a text")
    return bytes(value)


def _parts(fields: list[tuple[int, Value]], wanted: int) -> Iterator[memoryview]:
    return (value for field, value in fields if field == wanted and isinstance(value, memoryview))


def _fields(data: memoryview) -> Iterator[tuple[int, Value]]:
    """Field number and value of every field of a message."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        field, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, at = _varint(data, at)
            yield field, value
            continue
        if wire == BYTES:
            length, at = _varint(data, at)
        elif wire in (FIXED64, FIXED32):
            length = 8 if wire == FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + length > len(data):
            raise ValueError("it ends too early")
        yield field, data[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _varints(data: memoryview) -> list[int]:
    at, found = 0, []
    while at < len(data):
        value, at = _varint(data, at)
        found.append(value)
    return found
