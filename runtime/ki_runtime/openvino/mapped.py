"""Pages of the weights file that the engine has read and has no more use for.

Loading a compiled graph, it goes through the whole file; of what it copies into its own order it never reads the file
again. Those pages are let go of, so that they do not count as this process's; what is read again comes from the
system's cache.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

MAPS = Path("/proc/self/maps")
DONTNEED = 4  # of Linux: the next access reads the file again


def let_go(path: Path) -> int:
    """Let go of all pages of a file that are mapped for reading alone; how many mappings there were."""
    if not sys.platform.startswith("linux"):
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return sum(madvise(start, end - start, DONTNEED) == 0 for start, end in _mappings(path))


def _mappings(path: Path) -> Iterator[tuple[int, int]]:
    """Addresses where the file is mapped and cannot be written to, through which nothing can be lost."""
    try:
        lines, name = MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines(), str(path.resolve())
    except OSError:
        return
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == name and fields[1].startswith("r-"):
            start, _, end = fields[0].partition("-")
            yield int(start, 16), int(end, 16)
