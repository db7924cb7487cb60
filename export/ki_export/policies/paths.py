"""Paths that a checkpoint's files name: they stay in its folder."""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath

MAX_NAME = 255  # bytes of one part, which no file system exceeds
MAX_PARTS = 8


def is_inside(name: str) -> bool:
    """Whether a name is a relative path that leads nowhere else, and that a file can have."""
    parts = PurePosixPath(name).parts
    if not parts or len(parts) > MAX_PARTS or ".." in parts or name.startswith("/") or "\\" in name or "\0" in name:
        return False
    return not PureWindowsPath(name).drive and all(len(part.encode("utf-8", "replace")) <= MAX_NAME for part in parts)
