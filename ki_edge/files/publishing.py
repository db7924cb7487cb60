"""Folders that appear whole or not at all, and replace only what they may.

A new folder is filled under a name of its own (`staging`), written through to the disk, and exchanged with the one at
its target in a single step of the kernel (renameat2), so that there is no moment without one. Where a file system
cannot exchange (NFS, some FUSE), the old folder steps aside for the time of two renames and comes back if the second
fails. What is found after the exchange must be what was checked before it, or it is put back.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ki_edge.errors import KiEdgeError

from .staging import Staging, identity, put_back, staging, sweep
from .writing import reason

NOREPLACE, EXCHANGE = 1, 2  # flags of renameat2
AT_FDCWD = -100
UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
TRIES = 10


@contextmanager
def publishing(target: Path, check: Callable[[Path], object], error: type[KiEdgeError]) -> Iterator[Path]:
    """A folder that becomes `target` when the block ends without an error, and vanishes otherwise.

    `check` is given the target if something is there, before the block and again before it is replaced, and raises
    unless it may be. `error` for an OSError in the block, such as a full disk, and for a target that does not keep
    still.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent)
        if identity(target) is not None:
            check(target)
        with staging(target) as own:
            yield own.folder
            sync(own.folder)
            if not any(_place(own, target, check) for _ in range(TRIES)):
                raise error(f"{target} is made and removed by others all the time: choose another name")
            _sync(target.parent)
    except OSError as problem:
        named = problem.filename or target
        where = "" if str(named) == str(target) else f" ({named})"
        raise error(f"{target} could not be written: {reason(problem)}{where}") from problem


def sync(folder: Path) -> None:
    """Write every file and folder below `folder` through to the disk, so that a power cut finds all or nothing."""
    for parent, _, names in os.walk(folder, topdown=False, onerror=_raise):
        for name in names:
            path = Path(parent, name)
            if not path.is_symlink():
                _sync(path)
        _sync(parent)


def _raise(problem: OSError) -> None:
    raise problem


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as problem:
        if problem.errno not in UNSUPPORTED:  # some file systems have nothing to do for a folder
            raise OSError(problem.errno, reason(problem), str(path)) from problem
    finally:
        os.close(descriptor)


def _place(own: Staging, target: Path, check: Callable[[Path], object]) -> bool:
    """Put the folder at its target; False if that changed under our hands."""
    found = identity(target)
    if found is None:
        return move_new(own.folder, target)
    try:
        check(target)
    except KiEdgeError:
        if identity(target) == found:
            raise
        return False  # it was taken away while it was looked at
    own.may_remove(found)
    try:
        exchanged = _rename(own.folder, target, EXCHANGE)
    except FileNotFoundError:
        return False
    if not exchanged:
        return _step_aside(own, target, found)
    if identity(own.folder) == found:
        return True
    _rename(own.folder, target, EXCHANGE)
    return False


def _step_aside(own: Staging, target: Path, found: tuple[int, int]) -> bool:
    """Replace a folder by two renames, between which there is none."""
    try:
        target.rename(own.displaced)
    except FileNotFoundError:
        return False
    placed = False
    try:
        placed = identity(own.displaced) == found and move_new(own.folder, target)
    finally:
        if not placed:
            put_back(own.displaced, target)
    return placed


def move_new(path: Path, target: Path) -> bool:
    """Rename, but never over something; False if something is at `target`."""
    try:
        if _rename(path, target, NOREPLACE):
            return True
    except FileExistsError:
        return False
    try:
        if path.is_symlink():
            os.link(path, target, follow_symlinks=False)
            path.unlink()
            return True
        target.mkdir()  # a plain rename replaces an empty folder: so it must be ours
    except FileExistsError:
        return False
    try:
        path.rename(target)
    except OSError as problem:
        if problem.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        with suppress(OSError):
            target.rmdir()
        raise
    return True


def _rename(path: Path, other: Path, flags: int) -> bool:
    """The kernel's renameat2; False where libc, kernel or file system have none with these flags."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(AT_FDCWD, os.fsencode(path), AT_FDCWD, os.fsencode(other), ctypes.c_uint(flags)) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(path), None, str(other))
