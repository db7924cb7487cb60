"""Normalisation statistics: where openpi and its users put them, read whole and bounded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ki_edge.errors import ArgumentError, CheckpointError
from ki_edge.policy.normalize import NormStats, read_norm_stats

NORM_STATS = "norm_stats.json"
MAX_BYTES = 64_000_000
MAX_DEPTH = 4  # of folders below assets/: an id may hold slashes
MAX_FOLDERS = 1000


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics by feature ("state", "actions"), the file that they come from, and its sha256."""

    features: Mapping[str, NormStats]
    source: str
    sha256: str


def find_statistics(folder: Path, given: Path | None) -> Statistics | str:
    """The statistics of an openpi checkpoint, or the sentence that says what is missing.

    Looked for in `given`, else in assets/ of the checkpoint, else of the folder above. Several are not chosen from.
    """
    if given is not None:
        return _only(list(stat_files(_existing(given))), given, f"no {NORM_STATS} in {given} (--norm-stats)")
    for place in (folder / "assets", folder.resolve().parent / "assets"):
        found = list(stat_files(place)) if place.is_dir() else []
        if found:
            return _only(found, place, "")
    return f"no {NORM_STATS} under assets/ (give --norm-stats, the file or a folder that holds it)"


def stat_files(place: Path) -> Iterator[Path]:
    """The norm_stats.json files at or below a file or folder."""
    if place.is_file():
        yield place
        return
    folders = [(place, 0)]
    for at, (folder, depth) in enumerate(folders):
        if at >= MAX_FOLDERS:
            raise CheckpointError(f"{place}: more than {MAX_FOLDERS} folders below it; give --norm-stats the right one")
        if (folder / NORM_STATS).is_file():
            yield folder / NORM_STATS
        if depth < MAX_DEPTH:
            folders += [(child, depth + 1) for child in sorted(folder.iterdir()) if child.is_dir()]


def read_statistics(path: Path, source: str) -> Statistics:
    """One norm_stats.json of bounded size. CheckpointError, ContractError."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise CheckpointError(f"{path}: {size} bytes are too many for statistics (at most {MAX_BYTES})")
    return Statistics(read_norm_stats(path), source, hashlib.sha256(path.read_bytes()).hexdigest())


def _only(found: list[Path], place: Path, otherwise: str) -> Statistics | str:
    if not found:
        return otherwise
    if len(found) > 1:
        ids = ", ".join(path.parent.relative_to(place).as_posix() for path in found)
        return f"statistics of several robots under {place.name}/: {ids} (give --norm-stats {place.name}/ID)"
    base = place if place.is_dir() else place.parent
    return read_statistics(found[0], f"{base.name}/{found[0].relative_to(base).as_posix()}")


def _existing(path: Path) -> Path:
    if not path.exists():
        raise ArgumentError(f"--norm-stats {path}: no such file or folder")
    return path
