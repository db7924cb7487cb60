"""The checkpoint's file in a bundle: bytes of its own, or, where asked for, a hard link.

A reflink shares blocks on the disk until one side is written to: it takes no time and no room, and nobody who writes
into the checkpoint reaches the bundle. btrfs, XFS and bcachefs have them, ext4 has not; there the file is copied.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from ki_edge.errors import ExportError
from ki_edge.files.writing import reason

from .safetensors_writer import copy_file

FICLONE = 0x40049409  # of linux/fs.h
NO_REFLINK = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM, errno.EBADF)


def own_file(source: Path, path: Path) -> str:
    """Put a file's bytes at a new path: "reflinked" or "copied". ExportError if it cannot be."""
    source = source.resolve()
    if reflink(source, path):
        return "reflinked"
    copy_file(source, path)
    return "copied"


def link_file(source: Path, path: Path) -> str:
    """A hard link: "linked". ExportError where the file system has none, or `path` is on another one."""
    source = source.resolve()
    try:
        os.link(source, path)
    except OSError as error:
        raise ExportError(
            f"cannot link {source} to {path}: {reason(error)}; leave --link out, and the bundle gets a copy"
        ) from error
    return "linked"


def reflink(source: Path, path: Path) -> bool:
    """Clone a file; False, and nothing at `path`, where the file system cannot. ExportError for any other failure."""
    try:
        with source.open("rb") as old, path.open("xb") as new:
            fcntl.ioctl(new.fileno(), FICLONE, old.fileno())
            os.fsync(new.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.errno in NO_REFLINK:
            return False
        raise ExportError(f"cannot write {path}: {reason(error)}") from error
    return True
