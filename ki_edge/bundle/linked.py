"""Weights that a bundle shares with its checkpoint (`ki-export --link`): checked at every open.

Whoever writes into the checkpoint's file writes into the bundle. What the system says of the file is kept beside it, in
`weights.link.json`: its size, when it was last written and changed, inode and device. As long as all of that is the
same, so are its bytes. After any difference the file is hashed again, and refused unless the hash is the recorded one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from ki_edge.errors import BundleError
from ki_edge.files.reading import read_object
from ki_edge.files.writing import write_file

from .files import sha256

RECORD = "weights.link.json"
SAMPLE = 1 << 26  # bytes after which it is told how long hashing takes
MOST_BYTES = 10_000
Say = Callable[[str], object]


def record_link(path: Path) -> None:
    """Note the present state of a weights file whose bytes are known. BundleError if the note cannot be written."""
    write_file(path.with_name(RECORD), json.dumps(_state(path), indent=1) + "\n", BundleError)


def check_link(path: Path, digest: object, say: Say) -> None:
    """BundleError if a shared weights file holds other bytes than were exported. `digest`: its recorded sha256."""
    if _recorded(path.with_name(RECORD)) == (state := _state(path)):
        return
    start = time.perf_counter()
    progress = _Progress(path, state["size"], say)
    found = sha256(path, progress)
    if found != digest or _state(path) != state:
        raise BundleError(
            f"{path} is shared with its checkpoint (--link) and has changed since the export: export again, without "
            "--link for weights of the bundle's own"
        )
    say(f"{path} is what was exported (hashed in {time.perf_counter() - start:.1f} s)")
    try:
        record_link(path)
    except BundleError as error:
        say(f"it is hashed at every start: {error}")


def _state(path: Path) -> dict[str, int]:
    status = path.stat()
    return {
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "inode": status.st_ino,
        "device": status.st_dev,
    }


def _recorded(path: Path) -> dict[str, int] | None:
    try:
        return read_object(path, BundleError, MOST_BYTES)
    except BundleError:
        return None


class _Progress:
    """Says once how long hashing a large file will take."""

    def __init__(self, path: Path, size: int, say: Say) -> None:
        self._path, self._size, self._say = path, size, say
        self._start, self._done = time.perf_counter(), 0
        if size <= SAMPLE:
            say(f"{path} is shared with its checkpoint and may have changed: hashing it")

    def __call__(self, count: int) -> None:
        before, self._done = self._done, self._done + count
        if before < SAMPLE <= self._done < self._size:
            seconds = (time.perf_counter() - self._start) * self._size / self._done
            self._say(
                f"{self._path} is shared with its checkpoint and may have changed: hashing {self._size / 1e9:.1f} GB, "
                f"about {seconds:.0f} s"
            )
