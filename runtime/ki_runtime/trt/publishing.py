"""Folders that appear whole or not at all, and what killed builds left of theirs."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import gethostname

from ki_edge.errors import BackendError

PARTIAL = re.compile(r"\..+\.partial-(?:(?P<place>.+)-)?(?P<pid>\d+)(?:-old)?")
STALE = 24 * 3600.0  # seconds after which a partial folder of unknown origin belongs to nobody


@contextmanager
def publishing(target: Path) -> Iterator[Path]:
    """A folder that becomes `target` when the block ends without an error, and vanishes otherwise.

    An OSError in the block, such as a full disk, becomes a BackendError.
    """
    partial = target.parent / f".{target.name}.partial-{place()}-{os.getpid()}"
    try:
        target.parent.mkdir(exist_ok=True)
        _sweep(target.parent)
        partial.mkdir()
    except OSError as error:
        raise BackendError(f"cannot write engines into {target.parent} ({error}): copy the bundle elsewhere") from error
    try:
        yield partial
        old = partial.with_name(f"{partial.name}-old")
        if target.exists():
            target.rename(old)
        partial.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise BackendError(f"engines could not be built in {target.parent}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def place() -> str:
    """Where process numbers mean the same: this host and, in a container, its own numbering."""
    numbering = ""
    with suppress(OSError):
        numbering = re.sub(r"\D", "", str(Path("/proc/self/ns/pid").readlink()))
    return re.sub(r"[^\w.]", "_", gethostname()) + f".{numbering}"


def _sweep(folder: Path) -> None:
    """Remove what dead processes of this place left behind, and whatever is a day old."""
    for stale in folder.glob(".*.partial-*"):
        found = PARTIAL.fullmatch(stale.name)
        if found is None or not stale.is_dir():
            continue
        dead = found["pid"] == str(os.getpid()) or not Path(f"/proc/{found['pid']}").exists()
        if (found["place"] == place() and dead) or time.time() - stale.stat().st_mtime > STALE:
            shutil.rmtree(stale, ignore_errors=True)
