"""Arrays from an .npz file of anybody: their headers are read and judged before any of their data.

Nothing is unpickled, and a file that unpacks to more than it may is refused before it is unpacked.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.errors import KiEdgeError

Header = tuple[tuple[int, ...], "np.dtype[Any]"]  # shape, dtype
Arrays = dict[str, npt.NDArray[Any]]
MAX_ENTRIES = 10_000
MAX_AXES = 16
# What zipfile and numpy raise for a damaged, encrypted or foreign archive.
UNREADABLE = (
    OSError, ValueError, EOFError, KeyError, TypeError, SyntaxError, OverflowError, RuntimeError, MemoryError,
    NotImplementedError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_npy: Any = np.lib.format  # some of its functions carry no types in numpy 1


def read_npz(
    path: Path, most: int, error: type[KiEdgeError], check: Callable[[Mapping[str, Header]], str] | None = None
) -> Arrays:
    """All arrays of a file, at most `most` bytes unpacked.

    `check` is given shapes and dtypes before any data is read, and says what is wrong with them, "" if nothing.
    `error`, one line that names the file, for that and for a file that is missing, damaged, too large, or no regular
    file.
    """
    try:
        if not path.is_file():
            raise error(f"{path}: {'not a regular file' if path.exists() else 'no such file'}; expected arrays (.npz)")
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_ENTRIES:
                raise ValueError(f"{len(entries)} entries, at most {MAX_ENTRIES}")
            headers = {_name(entry): _header(archive, entry) for entry in entries}
            if len(headers) != len(entries):
                raise ValueError("a name comes twice")
            size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in headers.values())
            if size > most:
                raise error(f"{path}: {size} bytes of arrays, at most {most} are read")
            fault = check(headers) if check is not None else ""
            if fault:
                raise error(f"{path}: {fault}")
            return {_name(entry): _array(archive, entry) for entry in entries}
    except error:
        raise
    except UNREADABLE as problem:
        why = " ".join(str(problem).split())[:200] or type(problem).__name__
        raise error(f"{path}: no .npz file of arrays that can be read ({why})") from None


def _name(entry: zipfile.ZipInfo) -> str:
    name = entry.filename.removesuffix(".npy")
    if not name or not name.isprintable():
        raise ValueError(f"the name {name[:60]!r}")
    return name


def _header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Header:
    """Shape and dtype of one array, which must be what its entry has room for."""
    with archive.open(entry) as file:
        version = _npy.read_magic(file)
        read = _npy.read_array_header_1_0 if version == (1, 0) else _npy.read_array_header_2_0
        shape, _, dtype = read(file)
        start = file.tell()
    if dtype.hasobject or dtype.kind == "V":
        raise ValueError(f"'{entry.filename}' holds Python objects or records")
    if len(shape) > MAX_AXES or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"'{entry.filename}' has the shape {shape!r:.80}")
    if start + math.prod(shape) * dtype.itemsize != entry.file_size:
        raise ValueError(f"'{entry.filename}' does not fit its {entry.file_size} bytes")
    return tuple(shape), dtype


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> npt.NDArray[Any]:
    with archive.open(entry) as file:
        array: npt.NDArray[Any] = _npy.read_array(file, allow_pickle=False)
    return array
