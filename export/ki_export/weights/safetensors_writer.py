"""Write a safetensors file piece by piece, hashed on the way. Memory: a few pieces, whatever the size of a tensor."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ki_edge.dtypes import STORED
from ki_edge.errors import ExportError
from ki_edge.files.writing import writing

ALIGNMENT = 64  # of the first tensor, in bytes
WAITING = 4  # pieces that may wait to be hashed
COPY = 1 << 26  # bytes at once


@dataclass(frozen=True)
class Part:
    """One tensor of the file: `pieces` gives its values or bytes in order, in the type `dtype` says."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[npt.NDArray[Any]]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * STORED[self.dtype].nbytes


def write_tensors(path: Path, parts: Sequence[Part], metadata: Mapping[str, str]) -> str:
    """Write a new file of these tensors, in this order; the sha256 of the file.

    ExportError if the disk is too small, writing fails, or a part gives too many or too few bytes.
    """
    header = _header(parts, metadata)
    total = sum(part.nbytes for part in parts)
    check_space(path, len(header) + total)
    with _output(path, total) as write:
        write(header)
        for part in parts:
            done = 0
            for piece in part.pieces():
                done += piece.nbytes
                write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
            if done != part.nbytes:
                raise ExportError(f"{path}: '{part.name}' has {done} bytes, its shape says {part.nbytes}")
    return write.digest()


def copy_file(source: Path, path: Path) -> None:
    """Copy a file in the kernel, with a bar. ExportError if the disk is too small or copying fails."""
    size = source.stat().st_size
    check_space(path, size)
    with (
        writing(path, ExportError),
        source.open("rb") as old,
        path.open("xb") as new,
        tqdm(total=size, desc="copying", unit="B", unit_scale=True, disable=None, leave=False) as bar,
    ):
        while count := os.sendfile(new.fileno(), old.fileno(), None, COPY):
            bar.update(count)
        os.fsync(new.fileno())
        if new.tell() != size:
            raise ExportError(f"{source} became shorter while it was copied: is it still written?")


def check_space(path: Path, wanted: int) -> None:
    """ExportError unless the disk has room for `wanted` bytes more."""
    free = shutil.disk_usage(path.parent).free
    if free < wanted:
        raise ExportError(
            f"{path.parent}: the weights need {wanted / 1e9:.1f} GB and only {free / 1e9:.1f} GB are free: "
            "make room, or choose an output on another disk"
        )


class _Writer:
    """A file whose bytes are hashed in another thread, a bar on a terminal showing how far it is."""

    def __init__(self, file: Any, bar: Any, hasher: ThreadPoolExecutor) -> None:
        self._file, self._bar, self._hasher = file, bar, hasher
        self._digest = hashlib.sha256()
        self._waiting: deque[Future[None]] = deque()

    def __call__(self, piece: Any) -> None:
        self._waiting.append(self._hasher.submit(self._digest.update, piece))
        self._file.write(piece)
        self._bar.update(len(piece))
        while len(self._waiting) > WAITING:
            self._waiting.popleft().result()

    def digest(self) -> str:
        """Of everything that was written."""
        while self._waiting:
            self._waiting.popleft().result()
        return self._digest.hexdigest()


@contextmanager
def _output(path: Path, total: int) -> Iterator[_Writer]:
    with (
        writing(path, ExportError),
        path.open("xb") as file,
        tqdm(total=total, desc="weights", unit="B", unit_scale=True, disable=None, leave=False) as bar,
        ThreadPoolExecutor(1) as hasher,
    ):
        yield _Writer(file, bar, hasher)
        file.flush()
        os.fsync(file.fileno())


def _header(parts: Sequence[Part], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for part in parts:
        begin, end = end, end + part.nbytes
        header[part.name] = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
