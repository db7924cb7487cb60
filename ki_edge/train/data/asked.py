"""The datasets that a user names: "PATH[:WEIGHT]" each."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ki_edge.errors import ArgumentError
from ki_edge.files.hub import DATASET, HUB_ID, resolve

from .names import plain

WEIGHT = re.compile(r"[0-9]*\.?[0-9]+")
Say = Callable[[str], object]


@dataclass(frozen=True)
class Wanted:
    """A dataset of the command line. `weight`: None where none was given."""

    path: Path
    weight: float | None
    name: str


def named(datasets: Sequence[str], say: Say) -> list[Wanted]:
    """The datasets with names of their own: a folder's, with a number where it was taken."""
    if not datasets:
        raise ArgumentError("no dataset: name at least one")
    found: list[Wanted] = []
    for text in datasets:
        path, weight = text, None
        head, colon, tail = text.rpartition(":")
        if colon and head and not _exists(text):
            if not WEIGHT.fullmatch(tail) or not float(tail) > 0:
                raise ArgumentError(
                    f"{text[:200]}: the weight behind the colon is {tail[:40]!r}, expected a number above 0"
                )
            path, weight = head, float(tail)
        place = _resolved(path, say)
        base = plain(Path(path).resolve().stem if place == Path(path) else path)
        taken = {one.name for one in found}
        names = [base, *(f"{base}-{number}" for number in range(2, len(datasets) + 2))]
        found.append(Wanted(place, weight, next(name for name in names if name not in taken)))
    given = [one for one in found if one.weight is not None]
    if given and len(given) < len(found):
        missing = next(one for one in found if one.weight is None)
        raise ArgumentError(
            f"{missing.path}: no weight, but {given[0].path} has one: give all of them a weight, or none"
        )
    return found


def _resolved(name: str, say: Say) -> Path:
    """The folder of a path or of the Hub's "OWNER/NAME[@REVISION]"."""
    repo, at, revision = name.partition("@")
    if _exists(name) or not HUB_ID.fullmatch(repo):
        return Path(name)  # whoever opens it says what is missing
    return resolve(repo, revision=revision if at else None, say=say, kind=DATASET).folder


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long for a path, or not allowed to look
        return False
