"""How much of a disk recordings may take."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

GB = 1_000_000_000
RESERVE = 256_000_000  # bytes of the disk that are left to others
EPISODE = 150_000  # bytes that an episode takes when it is finished beside what it has then, about: its statistics


class Room:
    """`limit` bytes of everything under `folder`, whoever wrote it; and RESERVE bytes of the disk stay free."""

    def __init__(self, folder: Path, limit: int, reserve: int = RESERVE) -> None:
        self.folder, self.limit, self.reserve = folder, limit, reserve
        self.used = size_of(folder)

    def shortage(self, more: int) -> str:
        """Why `more` bytes of open files are too many; "" if they are not."""
        if self.used + more >= self.limit:
            return f"{self.folder} holds {(self.used + more) / GB:.3g} GB, the limit is {self.limit / GB:.3g} GB"
        free = shutil.disk_usage(self.folder).free
        if free < self.reserve:
            return (
                f"{free / GB:.2g} GB are free on the disk of {self.folder}, {self.reserve / GB:.2g} are left to others"
            )
        return ""


def size_of(folder: Path) -> int:
    """Bytes of all files under a folder; links are not followed."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size  # noqa: PTH118
            except OSError:  # renamed meanwhile
                continue
    return total
