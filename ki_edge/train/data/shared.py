"""Arrays that worker processes map instead of getting copies of: they lie in a file without a name.

Nothing is left of it when the last process that has it open has ended, however it ended.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping
from multiprocessing import reduction
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.errors import DatasetError
from ki_edge.files.writing import writing

Array = npt.NDArray[Any]
Place = tuple[str, str, tuple[int, ...], int]  # name, dtype, shape, offset in the file
ALIGNED = 64  # bytes


class SharedArrays:
    """Read-only arrays by name. It can be given to a process that is being started, and only then."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        places: list[Place] = []
        place = f"the numbers of a dataset into {tempfile.gettempdir()}"
        with writing(place, DatasetError), tempfile.TemporaryFile(prefix="ki-train-") as file:
            for name, array in arrays.items():
                offset = -(-file.tell() // ALIGNED) * ALIGNED
                file.seek(offset)
                places.append((name, array.dtype.str, array.shape, offset))
                np.ascontiguousarray(array).tofile(file)
            file.truncate(max(1, file.tell()))
            file.flush()
            self._open(os.dup(file.fileno()), places)

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name]

    def _open(self, file: int, places: list[Place]) -> None:
        self._file, self._places = file, places
        whole = np.frombuffer(mmap.mmap(file, 0, access=mmap.ACCESS_READ), np.uint8)
        self._arrays = {}
        for name, dtype, shape, offset in places:
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            self._arrays[name] = whole[offset : offset + size].view(dtype).reshape(shape)

    def __del__(self) -> None:
        if (file := getattr(self, "_file", None)) is not None:
            os.close(file)

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (reduction.DupFd(self._file), self._places)


def _opened(descriptor: Any, places: list[Place]) -> SharedArrays:
    found = SharedArrays.__new__(SharedArrays)
    found._open(descriptor.detach(), places)
    return found
