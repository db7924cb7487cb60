"""Where a graph's weights lie: in the bundle's weights file and nowhere else.

ONNX lets every tensor name a file of its own, which engines open: "../../etc/passwd" in old versions of ONNX Runtime,
an address in the process's memory in others. So every tensor that a graph holds anywhere, also in attributes, subgraphs
and functions, is looked at before an engine reads the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from ki_edge.errors import BundleError
from ki_edge.files.protobuf import fields
from ki_edge.files.reading import read_file

MOST_BYTES = 64_000_000  # of a graph without weights; the largest of a real model has under a million
MOST_DEPTH = 32
GRAPH, TRAINING, NODE, ATTRIBUTE, SPARSE, TENSOR, FUNCTION = "graph", "training", "node", "attr", "sparse", "t", "func"
# Of each message in onnx.proto the fields that lead to tensors
MODEL = {7: GRAPH, 20: TRAINING, 25: FUNCTION}
INSIDE = {
    GRAPH: {1: NODE, 5: TENSOR, 15: SPARSE},
    TRAINING: {1: GRAPH, 2: GRAPH},
    NODE: {5: ATTRIBUTE},
    ATTRIBUTE: {5: TENSOR, 6: GRAPH, 10: TENSOR, 11: GRAPH, 22: SPARSE, 23: SPARSE},
    SPARSE: {1: TENSOR, 2: TENSOR},
    FUNCTION: {7: NODE, 11: ATTRIBUTE},
}
EXTERNAL, LOCATION = 13, 14  # of a tensor: key and value pairs; 1 where the values are external
KEY, VALUE = 1, 2
Place = dict[bytes, bytes]


def check_external_data(graph: Path, weights: Path) -> None:
    """BundleError unless all external values of an ONNX file lie in `weights`, a file of the same folder."""
    states = [(status.st_ino, status.st_size, status.st_mtime_ns) for status in (graph.stat(), weights.stat())]
    _check(graph, weights.name, weights.stat().st_size, str(states))


@lru_cache(maxsize=64)
def _check(graph: Path, weights: str, size: int, states: str) -> None:
    if graph.suffix != ".onnx":
        raise BundleError(f"{graph}: a graph's file is named *.onnx")
    try:
        for place in _places(memoryview(read_file(graph, MOST_BYTES, BundleError)), MODEL, 0):
            _check_place(graph, place, weights, size)
    except (ValueError, IndexError, TypeError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{graph} is not a readable ONNX graph ({error}): copy or export the bundle again") from None


def _check_place(graph: Path, place: Place, weights: str, size: int) -> None:
    name = place.get(b"location", b"").decode("utf-8", "replace")
    if name != weights:
        raise BundleError(
            f"{graph}: a tensor lies in {name[:200]!r}, not in the bundle's {weights}: do not use this bundle"
        )
    offset, length = (_number(place.get(key, b"0")) for key in (b"offset", b"length"))
    if offset + length > size:
        raise BundleError(f"{graph}: a tensor ends at byte {offset + length} of {weights}, which has {size}")


def _number(text: bytes) -> int:
    if not text.isdigit() or len(text) > 19:
        raise ValueError(f"{text[:40]!r} is not a number of bytes")
    return int(text)


def _places(message: memoryview, kinds: dict[int, str], depth: int) -> Iterator[Place]:
    """The external data of every tensor below a message."""
    if depth > MOST_DEPTH:
        raise ValueError(f"nested more than {MOST_DEPTH} deep")
    for field, value in fields(message):
        kind = kinds.get(field)
        if kind is None:
            continue
        if not isinstance(value, memoryview):
            raise ValueError(f"field {field} is not a message")
        if kind != TENSOR:
            yield from _places(value, INSIDE[kind], depth + 1)
        elif (place := _place(value)) is not None:
            yield place


def _place(tensor: memoryview) -> Place | None:
    """Where a tensor's values lie outside of the graph; None if they are in it."""
    found: Place = {}
    external = False
    for field, value in fields(tensor):
        if field == LOCATION:
            external = external or value != 0
        elif field == EXTERNAL and isinstance(value, memoryview):
            entry = {number: bytes(text) for number, text in fields(value) if isinstance(text, memoryview)}
            key = entry.get(KEY, b"")
            if key in found:
                raise ValueError(f"{key!r} comes twice in a tensor's external data")
            found[key] = entry.get(VALUE, b"")
            external = True
    return found if external else None
