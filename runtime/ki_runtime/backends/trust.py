"""Which engines were built here, so that they may bring code of the host's, or are read before anything is proven.

Engines for the lean runtime carry such code, and loading them runs it; compiled graphs of OpenVINO are read by a parser
that was not made for foreign files. A bundle is copied from machine to machine and says what it likes about itself, so
what was built here is remembered outside of it, by content: an empty file for each engine, named by its sha256, in the
state folder of the user who built it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

DIGEST = re.compile(r"[0-9a-f]{64}")
MOST = 1000  # files; the oldest make room


def folder() -> Path:
    """Where it is remembered: $XDG_STATE_HOME, or ~/.local/state. RuntimeError or OSError for a user without a home."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (state if state.is_absolute() else Path.home() / ".local" / "state") / "ki-edge" / "built-here"


def built_here(digest: str) -> bool:
    """Whether an engine of this sha256 was built by this user on this machine."""
    if DIGEST.fullmatch(digest) is None:  # it comes out of a bundle
        return False
    try:
        mark = (folder() / digest).lstat()
    except (OSError, RuntimeError):
        return False
    return not hasattr(os, "getuid") or mark.st_uid == os.getuid()


def remember(digest: str) -> None:
    """That an engine of this sha256 was built here. OSError or RuntimeError if it cannot be written down."""
    known = folder()
    known.mkdir(mode=0o700, parents=True, exist_ok=True)
    marks = sorted(known.iterdir(), key=lambda path: path.lstat().st_mtime)
    for oldest in marks[: max(0, len(marks) + 1 - MOST)]:
        oldest.unlink(missing_ok=True)
    (known / digest).touch(mode=0o600)
