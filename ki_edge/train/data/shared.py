"""Arrays that worker processes map instead of getting copies of: they lie in a file without a name.

Nothing is left of it when the last process that has it open has ended, however it ended.
"""

from __future__ import annotations

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
        with writing(f"the numbers of a dataset in {tempfile.gettempdir()}", DatasetError):
            self._file = tempfile.TemporaryFile(prefix="ki-train-")  # noqa: SIM115
            for name, array in arrays.items():
                offset = -(-self._file.tell() // ALIGNED) * ALIGNED
                self._file.seek(offset)
                places.append((name, array.dtype.str, array.shape, offset))
                np.ascontiguousarray(array).tofile(self._file)
            self._file.truncate(max(1, self._file.tell()))
            self._file.flush()
        self._open(places)

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name]

    def _open(self, places: list[Place]) -> None:
        self._places = places
        whole: Any = np.memmap(self._file, np.uint8, "r")
        self._arrays = {}
        for name, dtype, shape, offset in places:
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            self._arrays[name] = np.asarray(whole[offset : offset + size]).view(dtype).reshape(shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (reduction.DupFd(self._file.fileno()), self._places)


def _opened(descriptor: Any, places: list[Place]) -> SharedArrays:
    found = SharedArrays.__new__(SharedArrays)
    found._file = os.fdopen(descriptor.detach(), "rb")  # type: ignore[assignment]
    found._open(places)
    return found
