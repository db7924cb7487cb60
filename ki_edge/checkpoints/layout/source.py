"""The tensors of a checkpoint under openpi's key names, wherever and however they are stored.

A source tells names, shapes and types without reading a tensor, and gives values a few rows at a time: a checkpoint of
any size is read with the memory of one piece.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.dtypes import FLOATS
from ki_edge.errors import CheckpointError
from ki_edge.files.safetensors_index import SafetensorsIndex

F32 = npt.NDArray[np.float32]
PIECE = 1 << 22  # elements of one piece, 16 MB
FileState = tuple[int, int, int, int]  # device, inode, size, time of the last change


@dataclass(frozen=True)
class Place:
    """Bytes of one tensor in a safetensors file: row-major, contiguous, in the tensor's stored type."""

    index: SafetensorsIndex
    name: str

    @property
    def offset(self) -> int:
        """From the start of the file."""
        return self.index.entries[self.name].offset


@dataclass(frozen=True)
class StoredTensor:
    """One tensor: safetensors' name of the stored type (F32, BF16 or F16), shape in openpi's PyTorch layout.

    `place` is None where the values are computed: transposed, sliced or merged from others.
    """

    dtype: str
    shape: tuple[int, ...]
    place: Place | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the stored type."""
        return self.elements * FLOATS[self.dtype].nbytes


class TensorSource(ABC):
    """Tensors by openpi's key. `files`: everything that is read, for hashes and to notice a change.

    Subclasses fill both and give `rows`.
    """

    tensors: Mapping[str, StoredTensor]
    files: tuple[Path, ...]
    geometry: Mapping[str, Any] = MappingProxyType({})  # what shapes of the PyTorch layout do not tell: heads

    @abstractmethod
    def rows(self, key: str, start: int, stop: int) -> F32:
        """Values float32 of rows start..stop of the first axis, exactly widened; a vector's rows are its elements."""

    def array(self, key: str) -> F32:
        """A whole tensor, float32."""
        shape = self.tensors[key].shape
        return self.rows(key, 0, shape[0]).reshape(shape)

    def pieces(self, key: str) -> Iterator[F32]:
        """A tensor as consecutive runs of whole rows, each of about PIECE elements."""
        tensor = self.tensors[key]
        step = max(1, PIECE * tensor.shape[0] // max(1, tensor.elements))
        for start in range(0, tensor.shape[0], step):
            yield self.rows(key, start, min(start + step, tensor.shape[0]))

    def states(self) -> dict[Path, FileState]:
        """What tells that a file has changed; CheckpointError for one that is gone."""
        return {path: file_state(path) for path in self.files}


class SafetensorsSource(TensorSource):
    """Tensors of one or several safetensors files. `names`: openpi's key -> (number of the file, name in it)."""

    def __init__(self, indexes: Sequence[SafetensorsIndex], names: Mapping[str, tuple[int, str]]) -> None:
        self.indexes = tuple(indexes)
        self.files = tuple(index.path for index in indexes)
        self.tensors = {key: _stored(indexes[at], name) for key, (at, name) in names.items()}

    def rows(self, key: str, start: int, stop: int) -> F32:
        tensor = self.tensors[key]
        assert tensor.place is not None
        row = tensor.nbytes // tensor.shape[0]
        raw = tensor.place.index.read(tensor.place.name, start * row, stop * row)
        if raw.size != (stop - start) * row:
            raise CheckpointError(f"{tensor.place.index.path} became shorter while it was read: is it still copied?")
        return widen(raw, tensor.dtype).reshape(stop - start, *tensor.shape[1:])


def widen(raw: npt.NDArray[np.uint8], dtype: str) -> F32:
    """Bytes of F32, F16 or BF16 values as float32 [elements]."""
    if dtype == "BF16":
        wide = np.zeros(raw.size // 2, np.uint32)
        wide.view(np.uint16)[1::2] = raw.view("<u2")
        return wide.view(np.float32)
    if dtype == "F16":
        return raw.view("<f2").astype(np.float32)
    return raw.view("<f4")


def encode(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.uint8]:
    """float32 values as bytes of F32, F16 or BF16 (rounded to nearest even; NaN stays NaN)."""
    values = np.ascontiguousarray(values, np.float32).reshape(-1)
    if dtype == "F32":
        return values.view(np.uint8)
    if dtype == "F16":
        return values.astype("<f2").view(np.uint8)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).view(np.uint8)


def file_state(path: Path) -> FileState:
    """Device, inode, size and modification time (ns) of a file."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read any more: {error.strerror}") from None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _stored(index: SafetensorsIndex, name: str) -> StoredTensor:
    entry = index.entries[name]
    return StoredTensor(entry.dtype, entry.shape, Place(index, name))
