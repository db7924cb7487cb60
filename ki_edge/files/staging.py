"""A folder of one's own beside a target, to fill before it is published, and what killed processes left of theirs.

    .NAME.partial-0123456789abcdef         the folder
    .NAME.partial-0123456789abcdef.lock    held (flock) while its process lives; notes which folders may be removed
    .NAME.partial-0123456789abcdef-old     what was at the target, for a moment, where nothing can be exchanged

Names are random and a lock tells who lives, never a process id: two containers that share a volume have the same ids.
Locks work between the containers of a host, and over NFS since Linux 2.6.12; where a file system has none, nothing is
swept. What another machine, or this one before it was started again, left behind is swept a day later. Nothing is
removed but what a note in a lock file names by its inode.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARK = b"ki_edge staging\n"
LOCK = re.compile(r"\.(?P<name>.+)\.partial-[0-9a-f]{16}\.lock", re.DOTALL)
MOST_NOTES = 4096  # bytes read of a lock file
PATIENCE = 24 * 3600.0  # seconds until what another machine left is nobody's
Identity = tuple[int, int]  # device, inode


class Staging:
    """The folder and its lock, held by this process."""

    def __init__(self, folder: Path, lock: Path, descriptor: int) -> None:
        self.folder, self.displaced = folder, _displaced(folder)
        self._lock, self._descriptor = lock, descriptor
        os.write(descriptor, MARK + f"boot {_boot()}\n".encode())
        folder.mkdir()
        found = identity(folder)
        assert found is not None
        self.may_remove(found)

    def may_remove(self, folder: Identity) -> None:
        """Note that this folder is ours to remove, if it is found under a name of ours."""
        os.write(self._descriptor, f"remove {folder[1]}\n".encode())
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Remove what lies under our names, and let go of the lock."""
        try:
            _clear(self._lock, self._descriptor)
        finally:
            os.close(self._descriptor)


@contextmanager
def staging(target: Path) -> Iterator[Staging]:
    """A new folder beside `target`, whose folder must exist. OSError if it cannot be made."""
    lock, descriptor = _new_lock(target)
    try:
        made = Staging(lock.with_suffix(""), lock, descriptor)
    except BaseException:
        lock.unlink(missing_ok=True)
        os.close(descriptor)
        raise
    try:
        yield made
    finally:
        made.close()


def sweep(parent: Path) -> None:
    """Remove what dead processes left in a folder; put back a target whose replacement never came."""
    for lock in parent.glob(".*.partial-*.lock"):
        if LOCK.fullmatch(lock.name) is None:
            continue
        with suppress(OSError):  # gone meanwhile, or another user's
            descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
                if regular and _take(descriptor) and _is_at(lock, descriptor):
                    _clear(lock, descriptor, of_others=True)
            finally:
                os.close(descriptor)


def identity(path: Path) -> Identity | None:
    """Device and inode of what is at a path, a link itself; None if nothing is."""
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


def put_back(displaced: Path, target: Path) -> None:
    """Give a folder that stepped aside its name back, or one beside it if another took that meanwhile."""
    try:
        displaced.rename(target)  # also over an empty folder
    except OSError:
        displaced.rename(f"{target}.old-{secrets.token_hex(4)}")


def _new_lock(target: Path) -> tuple[Path, int]:
    """A lock file that nobody else had before it was locked."""
    while True:
        lock = target.parent / f".{target.name}.partial-{secrets.token_hex(8)}.lock"
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            taken = _take(descriptor)
        except OSError:  # no locks on this file system: nobody can take it from us either
            taken = True
        if taken and _is_at(lock, descriptor):
            return lock, descriptor
        os.close(descriptor)  # a sweep came between


def _take(descriptor: int) -> bool:
    """Whether the lock was free. OSError where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    status = os.fstat(descriptor)
    return identity(path) == (status.st_dev, status.st_ino)


def _clear(lock: Path, descriptor: int, *, of_others: bool = False) -> None:
    """Remove what the notes of a lock file allow, and the file once nothing is left."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    content = os.read(descriptor, MOST_NOTES)
    if content and not content.startswith(MARK):
        return
    notes = [line.split(" ", 1) for line in content.decode("ascii", "replace").splitlines()[1:] if " " in line]
    here = ["boot", _boot()] in notes
    if of_others and content and not here and time.time() - os.fstat(descriptor).st_mtime < PATIENCE:
        return
    ours = {value for note, value in notes if note == "remove"}
    folder = lock.with_suffix("")
    displaced, target = _displaced(folder), lock.with_name(_name(lock))
    if _inode(folder) in ours and _inode(displaced) in ours:  # killed between the two renames
        put_back(displaced, target)
    for path in (folder, displaced):
        _remove(path, ours)
    if identity(folder) is None and identity(displaced) is None:
        lock.unlink(missing_ok=True)


def _remove(path: Path, ours: set[str]) -> None:
    if _inode(path) not in ours:
        with suppress(OSError):  # killed before it was noted: then it is empty
            path.rmdir()
    elif path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _inode(path: Path) -> str:
    found = identity(path)
    return "" if found is None else str(found[1])


def _displaced(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-old")


def _name(lock: Path) -> str:
    found = LOCK.fullmatch(lock.name)
    assert found is not None
    return found["name"]


def _boot() -> str:
    """Tells one start of a machine from another and from other machines; the same in all its containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return "unknown"
