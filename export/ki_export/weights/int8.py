"""The numbers of int8 weights, computed from a checkpoint a weight at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ki_edge.checkpoints.layout.source import TensorSource
from ki_export.passes.int8_parts import LEVELS, SCALES, VALUES, blocks

from .finite import finite_pieces

Int8 = npt.NDArray[np.int8]
F32 = npt.NDArray[np.float32]
LARGE = re.compile(r"((vision\.encoder|backbone|expert)\.layers\.\d+\.(self_attn|mlp)\.\w+|projector)\.weight")
TILE = 256  # rows that are transposed at a time


def is_large(name: str) -> bool:
    """Whether a weight (by the model's parameter name) is worth 8 bits: the products of every layer, the projector.

    In float32 remain what is small or read row by row: embeddings of patches and tokens, the unembedding's rows, the
    projections of actions, norms and the time modulation.
    """
    return LARGE.fullmatch(name) is not None


def split_key(key: str) -> tuple[str, str]:
    """A checkpoint key and what of it is meant: VALUES, SCALES or "" for the tensor itself."""
    for kind in (VALUES, SCALES):
        if key.endswith(kind):
            return key.removesuffix(kind), kind
    return key, ""


class Int8Weights:
    """Quantised weights of a source, one at a time: values and scales of a weight are asked for one after the other."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self._last: tuple[str, Int8, F32] | None = None

    def values(self, key: str) -> Iterator[Int8]:
        """int8, as `layout` has it, in one piece."""
        yield in_blocks(self._quantized(key)[1])

    def scales(self, key: str) -> Iterator[F32]:
        """f32 [out], in one piece."""
        yield self._quantized(key)[2]

    def _quantized(self, key: str) -> tuple[str, Int8, F32]:
        if self._last is None or self._last[0] != key:
            self._last = None  # one weight in memory, not two
            self._last = (key, *quantize_weight(self._source, key))
        return self._last


def layout(rows: int, columns: int) -> tuple[int, int]:
    """The shape in the file of the values of a weight [rows, columns]: blocks of outputs, each [in, out / blocks]."""
    count = blocks(rows)
    return count * columns, rows // count


def in_blocks(values: Int8) -> Int8:
    """Values int8 [in, out] as they lie in the file."""
    count = blocks(values.shape[1])
    return values if count == 1 else np.concatenate(np.split(values, count, axis=1))


def quantize_weight(source: TensorSource, key: str) -> tuple[Int8, F32]:
    """A weight [out, in] as int8 [in, out] and scales f32 [out]: W[o, i] is about values[i, o] * scales[o].

    Symmetric, with the largest magnitude of each row of W at 127. Memory: the int8 matrix and one piece of the source.
    """
    rows, columns = source.tensors[key].shape
    values, scales = np.empty((columns, rows), np.int8), np.empty(rows, np.float32)
    at = 0
    for piece in finite_pieces(key, source.pieces(key)):
        for start in range(0, len(piece), TILE):
            tile = piece[start : start + TILE]
            end = at + len(tile)
            scales[at:end] = _scales(tile)
            values[:, at:end] = np.rint(tile / scales[at:end, None]).astype(np.int8).T
            at = end
    return values, scales


def _scales(rows: F32) -> F32:
    """Of each row; 1 for a row of zeros."""
    largest = np.abs(rows).max(axis=1)
    return np.where(largest > 0, largest / np.float32(LEVELS), np.float32(1.0))
