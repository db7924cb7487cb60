"""Which weights of a bundle are not its checkpoint's: every value of both files, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from ki_edge.bundle import Bundle
from ki_edge.checkpoints import Checkpoint, TensorSource
from ki_edge.checkpoints.layout.keys import EMBEDDING, checkpoint_key
from ki_edge.checkpoints.layout.source import PIECE, encode
from ki_edge.dtypes import BY_ONNX, FLOATS
from ki_edge.errors import BundleError
from ki_export.graphs.wrappers import UNEMBEDDING, runs
from ki_export.passes.int8_parts import VALUES, Int8Weight, read_block_name

from .int8 import in_blocks, quantize_weight
from .low_differences import differing_low_weights

Int8Parts = tuple[list[Any], list[Any]]  # initializers of values and of scales


@dataclass(frozen=True)
class Stored:
    """`count` rows from `first` of a checkpoint tensor, as bytes at `offset` of a file, in a safetensors type."""

    key: str
    path: Path
    offset: int
    dtype: str
    first: int = 0
    count: int | None = None


def differing_weights(bundle: Bundle, checkpoint: Checkpoint) -> list[str]:
    """Checkpoint keys whose values in the bundle are not the checkpoint's, or not those quantised, in graph order."""
    scaled = exponents(bundle)
    found = [stored.key for stored in _runtime(bundle) if not _equal(stored, checkpoint.source)]
    for graph in bundle.manifest.graphs:
        proto = onnx.load(bundle.graph(graph), load_external_data=False)
        external = {t.name: t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
        for key, parts in _quantized(external, checkpoint.source).items():
            if key not in found and not _quantized_equal(bundle, key, parts, checkpoint.source):
                found.append(key)
        found += [key for key in differing_low_weights(bundle, external, checkpoint.source, scaled) if key not in found]
        for tensor in external.values():
            stored = _stored(bundle, checkpoint, tensor)
            if stored is None or stored.key in found:
                continue
            if not _equal(stored, checkpoint.source, scaled.get(stored.key, 0)):
                found.append(stored.key)
    return found


def exponents(bundle: Bundle) -> dict[str, int]:
    """Checkpoint key -> k of the weights that are stored divided by 2^k. BundleError if the manifest is malformed."""
    found = bundle.manifest.weights.get("exponents", {})
    if not isinstance(found, dict) or not all(type(k) is int for k in found.values()):
        raise BundleError(f"{bundle.path}: manifest 'weights': exponents must be integers by checkpoint key")
    return found


def _runtime(bundle: Bundle) -> Iterator[Stored]:
    """The weights that the runtime reads by itself."""
    index, recorded = bundle.weights(), bundle.manifest.weights
    table = {EMBEDDING: recorded["embeddings"]} if "embeddings" in recorded else {}
    for key, name in {**recorded["runtime"], **table}.items():
        entry = index.entries[str(name)]
        yield Stored(key, index.path, entry.offset, entry.dtype)


def _quantized(external: Mapping[str, Any], source: TensorSource) -> dict[str, Int8Parts]:
    """Checkpoint keys of quantised weights with the initializers of their values and of their scales."""
    parts: dict[str, dict[int, Any]] = {}
    for name, tensor in external.items():
        part, at = read_block_name(name) or (name, 0)
        parts.setdefault(part, {})[at] = tensor
    names = [Int8Weight.of(part.removesuffix(VALUES)) for part in parts if part.endswith(VALUES)]
    return {
        checkpoint_key(weight.weight): (_in_order(parts[weight.values]), _in_order(parts[weight.scales]))
        for weight in names
        if weight.scales in parts and checkpoint_key(weight.weight) in source.tensors
    }


def _in_order(blocks: Mapping[int, Any]) -> list[Any]:
    return [blocks[at] for at in sorted(blocks)]


def _stored(bundle: Bundle, checkpoint: Checkpoint, tensor: Any) -> Stored | None:
    """Where an initializer's values are and what they must be; None if they are not a checkpoint tensor as it is."""
    path, offset = _place(bundle, tensor)
    found = BY_ONNX.get(tensor.data_type)
    if found is None or found.stored not in FLOATS:
        return None
    dtype = found.stored
    if tensor.name.startswith(UNEMBEDDING) and tensor.name.removeprefix(UNEMBEDDING).isdigit():
        first, count = runs(bundle.manifest.vocabulary)[int(tensor.name.removeprefix(UNEMBEDDING))]
        return Stored(EMBEDDING, path, offset, dtype, first, count)
    key = checkpoint_key(tensor.name)
    return Stored(key, path, offset, dtype) if key in checkpoint.source.tensors else None


def _place(bundle: Bundle, tensor: Any) -> tuple[Path, int]:
    places = {entry.key: entry.value for entry in tensor.external_data}
    return bundle.file(places["location"]), int(places.get("offset", 0))


def _equal(stored: Stored, source: TensorSource, exponent: int = 0) -> bool:
    """Whether the bytes are the checkpoint's values / 2^exponent, rounded to the stored type; the file is read."""
    shape = source.tensors[stored.key].shape
    rows = shape[0] if stored.count is None else stored.count
    row = source.tensors[stored.key].elements // shape[0]
    step, offset = max(1, PIECE // row), stored.offset
    factor = np.float32(2.0**-exponent)
    for start in range(stored.first, stored.first + rows, step):
        values = source.rows(stored.key, start, min(start + step, stored.first + rows))
        expected = encode(values * factor if exponent else values, stored.dtype)
        if not np.array_equal(np.fromfile(stored.path, np.uint8, expected.size, offset=offset), expected):
            return False
        offset += expected.size
    return True


def _quantized_equal(bundle: Bundle, key: str, parts: Int8Parts, source: TensorSource) -> bool:
    """Whether initializers, one or one a block, are what quantising a checkpoint tensor gives."""
    values, scales = quantize_weight(source, key)
    if len(parts[1]) > 1:  # a wide layer; bundles before there were blocks have those in one, too
        values = in_blocks(values)
    expected: list[tuple[list[Any], npt.NDArray[Any]]] = [(parts[0], values), (parts[1], scales)]
    for tensors, whole in expected:
        for tensor, piece in zip(tensors, np.split(whole, len(tensors)), strict=True):
            path, offset = _place(bundle, tensor)
            if np.fromfile(path, np.uint8, piece.nbytes, offset=offset).tobytes() != piece.tobytes():
                return False
    return True
