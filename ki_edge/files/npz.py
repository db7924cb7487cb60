"""Arrays from an .npz file of anybody: their headers are read and judged before any of their data.

Nothing is unpickled, and a file that unpacks to more than it may is refused before it is unpacked.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.errors import KiEdgeError

Header = tuple[tuple[int, ...], "np.dtype[Any]"]  # shape, dtype
Headers = Mapping[str, Header]
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
    path: Path,
    most: int,
    error: type[KiEdgeError],
    check: Callable[[Headers], str] = lambda _: "",
    choose: Callable[[Headers], Iterable[str]] = tuple,
    cure: str = "",
) -> Arrays:
    """The arrays of a file that `choose` names (all), at most `most` bytes unpacked.

    `check` is given shapes and dtypes before any data is read, and says what is wrong with them, "" if nothing.
    `error`, one line that names the file and ends with `cure`, for that and for a file that is missing, damaged, too
    large, or no regular file.
    """
    with _opened(path, error, cure) as (archive, entries):
        found = {name: _header(archive, entry) for name, entry in entries.items()}
        headers = {name: header for name, (header, _) in found.items()}
        chosen = tuple(choose(headers))
        fault = check(headers)
        if not fault and (size := sum(_size(name, *found[name]) for name in chosen)) > most:
            fault = f"{size} bytes of arrays, at most {most} are read"
        if fault:
            raise error(f"{path}: {fault}{cure}")
        return {name: _array(archive, entries[name]) for name in chosen}


def read_headers(path: Path, error: type[KiEdgeError], cure: str = "") -> dict[str, Header]:
    """Shape and dtype of every array of a file, without its data. `error` as of `read_npz`."""
    with _opened(path, error, cure) as (archive, entries):
        return {name: _header(archive, entry)[0] for name, entry in entries.items()}


@contextmanager
def _opened(
    path: Path, error: type[KiEdgeError], cure: str
) -> Iterator[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]]:
    """The archive and its entries by the names of their arrays."""
    try:
        if not path.is_file():
            raise error(
                f"{path}: {'not a regular file' if path.exists() else 'no such file'}; expected arrays (.npz){cure}"
            )
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_ENTRIES:
                raise ValueError(f"{len(entries)} entries, at most {MAX_ENTRIES}")
            named = {_name(entry): entry for entry in entries}
            if len(named) != len(entries):
                raise ValueError("a name comes twice")
            yield archive, named
    except error:
        raise
    except UNREADABLE as problem:
        why = " ".join(str(problem).split())[:200] or type(problem).__name__
        raise error(f"{path}: no .npz file of arrays that can be read ({why}){cure}") from None


def _name(entry: zipfile.ZipInfo) -> str:
    name = entry.filename.removesuffix(".npy")
    if not name or not name.isprintable():
        raise ValueError(f"the name {name[:60]!r}")
    return name


def _header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> tuple[Header, int]:
    """Shape and dtype of one array, and the bytes that its entry has for its numbers."""
    with archive.open(entry) as file:
        version = _npy.read_magic(file)
        read = _npy.read_array_header_1_0 if version == (1, 0) else _npy.read_array_header_2_0
        shape, _, dtype = read(file)
        return (tuple(shape), dtype), entry.file_size - file.tell()


def _size(name: str, header: Header, there: int) -> int:
    """Bytes of one array. ValueError unless it is one of numbers or text, and as large as its entry."""
    shape, dtype = header
    if dtype.hasobject or dtype.kind == "V":
        raise ValueError(f"'{name}' holds Python objects or records")
    if len(shape) > MAX_AXES or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"'{name}' has the shape {shape!r:.80}")
    if math.prod(shape) * dtype.itemsize != there:
        raise ValueError(f"'{name}' does not fit its {there} bytes")
    return there


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> npt.NDArray[Any]:
    with archive.open(entry) as file:
        array: npt.NDArray[Any] = _npy.read_array(file, allow_pickle=False)
    return array
