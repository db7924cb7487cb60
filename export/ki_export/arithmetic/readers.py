"""Where an evaluated graph's weights come from: a checkpoint before the export, the bundle's weights file after it."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from io import RawIOBase
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from ki_edge.checkpoints import TensorSource
from ki_edge.errors import BundleError
from ki_export.weights.weights import TensorSlice

from .low_bits import E2M1
from .operators import TYPES

E2M1_NUMBERS = [
    sign * size for sign in (1.0, -1.0) for size in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
]  # by their bits


def _own_pages(nbytes: int) -> npt.NDArray[np.uint8]:
    """Memory that goes back to the system when it is dropped: a heap keeps what lies between things still in use."""
    return np.frombuffer(mmap.mmap(-1, max(1, nbytes), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8, nbytes)


def _fill(file: RawIOBase, array: npt.NDArray[np.uint8]) -> None:
    """Read until an array is full; a single read gives 2 GB at most."""
    view, done = array.data, 0
    while done < array.nbytes:
        count = file.readinto(view[done:])
        if not count:
            raise BundleError("the weights file became shorter while it was read: copy the bundle again")
        done += count


def _unpacked(packed: Tensor) -> Tensor:
    """e2m1 numbers of bytes that hold two each, the first in the low half."""
    halves = torch.stack([packed & 15, packed >> 4], -1).reshape(-1)
    return torch.tensor(E2M1_NUMBERS).to(E2M1)[halves.long()]


class CheckpointWeights:
    """Initializers of traced graphs, from the checkpoint tensors that `origins` names, in their declared types.

    `exponents`: weights by name that are divided by 2^k.
    """

    def __init__(
        self, source: TensorSource, origins: Mapping[str, TensorSlice], exponents: Mapping[str, int] | None = None
    ) -> None:
        self._source, self._origins, self._exponents = source, origins, exponents or {}

    def part(self, value: ir.Value, start: int, stop: int) -> Tensor:
        """Of the initializer's type."""
        origin = self._origins[str(value.name)]
        values = self._source.rows(origin.key, origin.first + start, origin.first + stop)
        assert value.shape is not None
        raw = _own_pages(values.nbytes)
        np.copyto(raw.view(np.float32), values.reshape(-1))
        tensor = torch.from_numpy(raw).view(torch.float32)
        return self._typed(value, tensor).reshape(stop - start, *value.shape.numpy()[1:])

    def rows(self, value: ir.Value, rows: Tensor) -> Tensor:
        """Of the initializer's type, [*rows.shape, ...]."""
        origin = self._origins[str(value.name)]
        ids, places = np.unique(rows.numpy(), return_inverse=True)
        starts = [origin.first + int(i) for i in ids]
        found = np.stack([self._source.rows(origin.key, start, start + 1)[0] for start in starts])
        taken = torch.from_numpy(found[places.reshape(-1)]).reshape(*rows.shape, *found.shape[1:])
        return self._typed(value, taken)

    def _typed(self, value: ir.Value, tensor: Tensor) -> Tensor:
        exponent = self._exponents.get(str(value.name).removesuffix(".weight"), 0)
        scaled = tensor / 2.0**exponent if exponent else tensor
        return scaled if value.dtype is None else scaled.to(TYPES[int(value.dtype)])


class FileWeights:
    """Initializers of a bundle's graphs, from where they point into its weights file, in their declared types."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def part(self, value: ir.Value, start: int, stop: int) -> Tensor:
        """In the declared type; BundleError if the file is too short."""
        place, dtype = self._place(value)
        path, offset, length = self._bytes(place)
        shape = place.shape.numpy()
        row = length // shape[0] if shape else length
        raw = _own_pages((stop - start) * row)
        with path.open("rb", buffering=0) as file:
            file.seek(offset + start * row)
            _fill(file, raw)
        found = _unpacked(torch.from_numpy(raw)) if dtype == E2M1 else torch.from_numpy(raw).view(dtype)
        return found.reshape(stop - start, *shape[1:]) if shape else found.reshape(())

    def rows(self, value: ir.Value, rows: Tensor) -> Tensor:
        """In the declared type, [*rows.shape, ...]."""
        place, dtype = self._place(value)
        shape = place.shape.numpy()
        path, offset, length = self._bytes(place)
        table = np.memmap(path, np.uint8, mode="r", offset=offset, shape=(length,)).reshape(shape[0], -1)
        taken = np.array(table[rows.numpy().reshape(-1)])
        return torch.from_numpy(taken).view(dtype).reshape(*rows.shape, *shape[1:])

    def _place(self, value: ir.Value) -> tuple[ir.ExternalTensor, torch.dtype]:
        place = value.const_value
        if not isinstance(place, ir.ExternalTensor):
            raise BundleError(f"'{value.name}' has no place in a weights file: export the checkpoint again")
        return place, TYPES[int(place.dtype)]

    def _bytes(self, place: ir.ExternalTensor) -> tuple[Path, int, int]:
        """File, offset and length of a tensor's bytes."""
        path = self._folder / Path(place.location).name
        length = math.ceil(math.prod(place.shape.numpy()) * place.dtype.itemsize)  # of e2m1 half a byte each
        offset = place.offset or 0
        if offset + length > path.stat().st_size:
            raise BundleError(f"{path} ends before '{place.name}': copy the bundle again")
        return path, int(offset), int(length)
