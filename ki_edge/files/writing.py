"""Files written so that a failure, such as a full disk, names the file, and leaves no half of it behind."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ki_edge.errors import KiEdgeError


@contextmanager
def writing(path: str | Path, error: type[KiEdgeError]) -> Iterator[None]:
    """An OSError in the block becomes an `error` that says which file could not be written, and why."""
    try:
        yield
    except OSError as problem:
        raise error(f"cannot write {path}: {reason(problem)}") from problem


def write_file(path: Path, content: bytes | str, error: type[KiEdgeError]) -> None:
    """Replace a file's whole content at once, or not at all. `error` names it if it cannot be written."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with writing(path, error):
        try:
            with partial.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def reason(problem: OSError) -> str:
    """What went wrong, in the system's words: "No space left on device"."""
    return problem.strerror or str(problem) or type(problem).__name__
