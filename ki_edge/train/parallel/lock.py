"""One run at a time in a folder: its main process holds a lock (flock) on a file in it while it lives."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from ki_edge.errors import ArgumentError

LOCK = ".lock"


def locked(out: Path) -> int | None:
    """A descriptor that holds the folder's lock; None where the file system has no locks.

    ArgumentError if another process holds it, OSError if the file cannot be made.
    """
    while True:
        # no link is followed: what it points to would be emptied
        descriptor = os.open(out / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            taken = _taken(descriptor, out)
        except ArgumentError:
            os.close(descriptor)
            raise
        except BaseException:  # a signal too: what was just made would be left behind
            (out / LOCK).unlink(missing_ok=True)
            os.close(descriptor)
            raise
        if taken is None:
            os.close(descriptor)
            return None
        if taken:
            return descriptor
        os.close(descriptor)  # whoever held it has taken the file away since


def _taken(descriptor: int, out: Path) -> bool | None:
    """Whether the lock on the folder's file is held now, with a word on who holds it; None where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 100).decode("ascii", "replace").strip()
        raise ArgumentError(
            f"another process trains into {out} ({holder or 'unknown'}): wait for it, end it, or name another folder"
        ) from None
    except OSError:
        return None
    if not _is_at(descriptor, out / LOCK):
        return False
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode("ascii", "replace"), 0)
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False
