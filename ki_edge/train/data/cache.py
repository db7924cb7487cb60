"""Pictures kept at the model's size: one file for each dataset, filled by whoever decodes a frame first.

A row holds one frame's pictures behind the CRC-32 of them and of its number. Rows are written in place by several
processes at once; what a kill or a power cut leaves half written, or empty, has another CRC and is decoded again. The
file is as large as its last row and takes the disk space of the rows that were written.

A frame's row is its number, so a cache that is too small for a dataset keeps its first frames: since an epoch shows
each frame once, keeping some of them is as good as keeping any.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.errors import ArgumentError, DatasetError
from ki_edge.files.writing import reason

UInt8 = npt.NDArray[np.uint8]
VERSION = 1
HEAD = 8  # bytes before a row's pictures: CRC-32, and the row's number
SPARE = 1 << 30  # bytes that stay free on the disk
FILE = "pictures.bin"


class FrameCache:
    """The first `rows` frames of one dataset, of `shape` [n,h,w,3] each. Every process opens the file for itself."""

    def __init__(self, path: Path, rows: int, shape: tuple[int, ...]) -> None:
        self._path, self._rows, self._shape = path, rows, shape
        self._size = HEAD + int(np.prod(shape))
        self._file: int | None = None
        self._full = False

    def get(self, frame: int) -> UInt8 | None:
        """A frame's pictures, or None if they are not there whole."""
        if frame >= self._rows or (file := self._opened()) is None:
            return None
        try:
            row = os.pread(file, self._size, frame * self._size)
        except OSError:  # it can be decoded again
            return None
        if len(row) < self._size or row[:HEAD] != _head(frame, row[HEAD:]):
            return None
        return np.frombuffer(row, np.uint8, offset=HEAD).reshape(self._shape)

    def put(self, frame: int, pictures: UInt8) -> None:
        """Keep a frame's pictures. A disk that is full or fails ends the keeping, not the training."""
        if frame >= self._rows or self._full or (file := self._opened()) is None:
            return
        content = np.ascontiguousarray(pictures).tobytes()
        try:
            row = _head(frame, content) + content
            self._full = os.pwrite(file, row, frame * self._size) < len(row)
        except OSError:
            self._full = True

    def _opened(self) -> int | None:
        if self._file is None and not self._full:
            try:
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError:
                self._full = True
        return self._file

    def close(self) -> None:
        """Close the file in this process."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_file": None}


def _head(frame: int, content: bytes) -> bytes:
    number = frame.to_bytes(HEAD - 4, "little")
    return zlib.crc32(content, zlib.crc32(number)).to_bytes(4, "little") + number


def open_caches(
    folder: Path, gigabytes: float, wanted: Sequence[tuple[str, Mapping[str, Any], int, tuple[int, ...]]]
) -> tuple[list[FrameCache], list[str]]:
    """A cache for each dataset, and what is to be said of them. `wanted`: (name, what its pictures follow from, frames,
    shape [n,h,w,3] of a frame). All share `gigabytes` by what they need, less what the folder holds of other datasets.

    ArgumentError for a bound that leaves no room; DatasetError for a folder that cannot be written and too little disk.
    """
    if not 0 < gigabytes < math.inf:
        raise ArgumentError(f"--cache-gb {gigabytes:g}: expected more than 0, and a number")
    bound = int(gigabytes * 1e9)
    places = [folder / _digest(facts, shape) for _, facts, _, shape in wanted]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for place in places:
            place.mkdir(exist_ok=True)
            with (place / FILE).open("ab"):
                pass
        own = sum(_taken(place / FILE) for place in set(places))
        others = sum(_taken(path) for path in folder.glob(f"*/{FILE}") if path.parent not in places)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise DatasetError(f"--cache {folder} cannot be written: {reason(error)}") from None
    room = bound - others
    if room <= 0:
        raise ArgumentError(
            f"--cache {folder} holds {others / 1e9:.1f} GB of other datasets or sizes, --cache-gb allows "
            f"{gigabytes:g}: remove folders in it, or allow more"
        )
    sizes = [HEAD + int(np.prod(shape)) for _, _, _, shape in wanted]
    need = sum(frames * size for (_, _, frames, _), size in zip(wanted, sizes, strict=True))
    kept = min(need, room)
    if kept - own + SPARE > free:
        raise DatasetError(
            f"--cache {folder}: {max(0, kept - own) / 1e9:.1f} GB more of decoded pictures would be kept, the disk has "
            f"{free / 1e9:.1f} GB free, of which {SPARE / 1e9:.0f} stay so: choose another folder, "
            "or a smaller --cache-gb"
        )
    caches, lines = [], []
    for (name, _, frames, shape), size, place in zip(wanted, sizes, places, strict=True):
        rows = min(frames, int(frames * (kept / need)))
        caches.append(FrameCache(place / FILE, rows, shape))
        share = "all frames" if rows == frames else f"{100 * rows / frames:.0f} % of the frames, as --cache-gb allows"
        lines.append(f"{name}: {share} are kept decoded in {place} (up to {rows * size / 1e9:.1f} GB)")
    return caches, lines


def _digest(facts: Mapping[str, Any], shape: tuple[int, ...]) -> str:
    text = repr((VERSION, sorted(facts.items()), shape))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _taken(path: Path) -> int:
    """Bytes of the disk that a file takes."""
    found = path.stat()
    return getattr(found, "st_blocks", found.st_size // 512) * 512
