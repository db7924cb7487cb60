"""Compiled graphs beside the bundle's engine records, so that a second start does not compile again.

A file holds a graph as the engine rewrote it, without weights: those stay in the bundle's own file, which is mapped.
Its name is a hash of everything that it depends on. Where the bundle cannot be written it lies in the user's cache, and
where nothing can be, each start compiles. What came with a copied bundle is not read: only what was compiled here is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ki_edge.errors import BackendError
from ki_edge.files.reading import read_file
from ki_edge.files.writing import write_file
from ki_runtime.backends.records import places
from ki_runtime.backends.trust import built_here, remember

MOST_BYTES = 1 << 28  # of a compiled graph: real ones take a few million
KEPT = 12  # compiled graphs in a folder: three graphs of a few variants
SUFFIX = ".blob"


@dataclass(frozen=True)
class Compiled:
    """A compiled graph without weights, and what tells it from every other."""

    content: bytes
    path: Path | None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


def read(folder: Path, graph: str, identity: Mapping[str, str]) -> Iterator[Compiled]:
    """What was kept here of this graph, one after the other; nothing where nothing can be read."""
    for path in places(folder, _name(graph, identity)):
        with suppress(BackendError):
            found = Compiled(read_file(path, MOST_BYTES, BackendError), path)
            if built_here(found.sha256):
                yield found


def keep(folder: Path, graph: str, identity: Mapping[str, str], content: bytes) -> Compiled:
    """Write a compiled graph down, whole or not at all; older ones go where there are too many."""
    for path in places(folder, _name(graph, identity)):
        with suppress(OSError, RuntimeError, BackendError):  # RuntimeError: a user without a home
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, content, BackendError)
            _drop_oldest(path.parent)
            made = Compiled(content, path)
            remember(made.sha256)
            return made
    return Compiled(content, None)


def forget(compiled: Compiled) -> None:
    """Take away a file that the engine refuses."""
    if compiled.path is not None:
        with suppress(OSError):
            compiled.path.unlink()


def kept(folder: Path) -> tuple[int, int]:
    """(files, bytes) of compiled graphs in a folder."""
    sizes = [path.stat().st_size for path in _all(folder)]
    return len(sizes), sum(sizes)


def _name(graph: str, identity: Mapping[str, str]) -> str:
    key = hashlib.sha256(json.dumps([graph, dict(identity)], sort_keys=True).encode()).hexdigest()[:16]
    return f"{graph}-{key}{SUFFIX}"


def _all(folder: Path) -> list[Path]:
    with suppress(OSError):
        return [path for path in folder.glob(f"*{SUFFIX}") if path.is_file() and not path.is_symlink()]
    return []


def _drop_oldest(folder: Path) -> None:
    with suppress(OSError):
        for path in sorted(_all(folder), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            path.unlink()
