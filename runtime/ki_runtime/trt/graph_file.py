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

from ki_edge.bundle.external_data import MOST_BYTES
from ki_edge.errors import BundleError
from ki_edge.files.protobuf import Value, fields, varints
from ki_edge.files.reading import read_file

# Field numbers of onnx.proto
MODEL_GRAPH, MODEL_OPSET = 7, 8
GRAPH_NODE, GRAPH_INITIALIZER = 1, 5
NODE_OPERATOR, NODE_DOMAIN = 4, 7
OPSET_DOMAIN, OPSET_VERSION = 1, 2
TENSOR_DIMS, TENSOR_TYPE, TENSOR_NAME, TENSOR_EXTERNAL = 1, 2, 8, 13
ENTRY_KEY, ENTRY_VALUE = 1, 2
BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16, 21: 4, 22: 4}
MOST_DIMS = 16
EMPTY = memoryview(b"")


@dataclass(frozen=True)
class GraphFile:
    """`operators`: how often each occurs; `weight_bytes`: of all weights at their declared types, shared ones once."""

    opset: int
    operators: Mapping[str, int]
    weight_bytes: int


def read_graph(path: Path) -> GraphFile:
    """Read one ONNX file. BundleError if it is damaged or no ONNX file."""
    content = read_file(path, MOST_BYTES, BundleError)
    try:
        model = list(fields(memoryview(content)))
        graph = [field for part in _parts(model, MODEL_GRAPH) for field in fields(part)]
        opsets = [dict(fields(part)) for part in _parts(model, MODEL_OPSET)]
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
    found = dict(fields(node))
    domain, name = (_bytes(found.get(key, EMPTY)).decode() for key in (NODE_DOMAIN, NODE_OPERATOR))
    return f"{domain}.{name}" if domain not in ("", "ai.onnx") else name


def _weight(tensor: memoryview) -> tuple[object, int]:
    """Where the weight lies, so that two uses of one place count once, and its bytes."""
    dims: list[int] = []
    place: dict[bytes, bytes] = {}
    name, bits = b"", 0
    for field, value in fields(tensor):
        if field == TENSOR_DIMS:
            dims += varints(value) if isinstance(value, memoryview) else [value]
        elif field == TENSOR_TYPE and isinstance(value, int):
            bits = BITS[value]
        elif isinstance(value, memoryview) and field == TENSOR_NAME:
            name = bytes(value)
        elif isinstance(value, memoryview) and field == TENSOR_EXTERNAL:
            entry = dict(fields(value))
            place[_bytes(entry[ENTRY_KEY])] = _bytes(entry[ENTRY_VALUE])
    if len(dims) > MOST_DIMS:
        raise ValueError(f"a tensor of {len(dims)} dimensions")
    where = (place[b"location"], place.get(b"offset", b"0")) if place else name
    return where, math.ceil(math.prod(dims) * bits / 8)


def _bytes(value: Value) -> bytes:
    if not isinstance(value, memoryview):
        raise TypeError("a number where text is expected")
    return bytes(value)


def _parts(found: list[tuple[int, Value]], wanted: int) -> Iterator[memoryview]:
    return (value for field, value in found if field == wanted and isinstance(value, memoryview))
