"""Which engine for a CPU was the fastest with a bundle on this machine: measured once, kept beside the engine records.

The record's name is a hash of everything that the outcome depends on, so an upgrade of an engine, another processor or
another bundle measures again. Where the bundle cannot be written it lies in the user's cache, else in this process.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

from ki_edge.bundle import Bundle
from ki_edge.errors import BackendError
from ki_edge.files.reading import read_object
from ki_edge.files.writing import write_file

from .processor import processor
from .records import places

SCHEMA = 1
MOST_BYTES = 1 << 16
_unwritten: dict[str, Choice] = {}


class Rival(Protocol):
    """A backend, as far as a choice goes."""

    @property
    def name(self) -> str: ...

    @property
    def package(self) -> str | None: ...


@dataclass(frozen=True)
class Choice:
    """Milliseconds that one inference took on each backend; infinite for one that could not. `date`: UTC, ISO 8601."""

    milliseconds: Mapping[str, float]
    date: str

    @property
    def fastest(self) -> str:
        return min(self.milliseconds, key=lambda name: self.milliseconds[name])

    def rank(self, name: str) -> float:
        """What backends are sorted by."""
        return self.milliseconds.get(name, math.inf)

    def against(self, name: str) -> str:
        """In a few words, how a backend compares with the fastest; empty for one that was not measured."""
        took = self.milliseconds.get(name)
        if took is None or name == self.fastest:
            return ""
        if not math.isfinite(took):
            return f"could not run it when it was measured on {self.date[:10]}"
        return f"slower here, {took:.0f} ms against {self.milliseconds[self.fastest]:.0f}, measured on {self.date[:10]}"


def find_choice(bundle: Bundle, rivals: Sequence[Rival]) -> Choice | None:
    """What was measured of this bundle and exactly these engines; None if nothing was, or nothing can be read."""
    if len(rivals) < 2:
        return None
    key = _key(bundle, rivals)
    for path in places(bundle.path / "engines", _file(key)):
        with suppress(BackendError, KeyError, TypeError, ValueError, AttributeError):
            content = read_object(path, BackendError, MOST_BYTES)
            times = {str(name): _milliseconds(took) for name, took in content["milliseconds"].items()}
            if content["schema"] == SCHEMA and set(times) == {rival.name for rival in rivals}:
                return Choice(times, str(content["date"])[:40])
    return _unwritten.get(key)


def keep_choice(bundle: Bundle, rivals: Sequence[Rival], choice: Choice) -> None:
    """Write it down, whole or not at all; where nothing can be written it holds until this process ends."""
    key = _key(bundle, rivals)
    times = {name: took if math.isfinite(took) else None for name, took in choice.milliseconds.items()}
    text = json.dumps({"schema": SCHEMA, "date": choice.date, "milliseconds": times}, indent=1) + "\n"
    for path in places(bundle.path / "engines", _file(key)):
        with suppress(OSError, BackendError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, text, BackendError)
            return
    _unwritten[key] = choice


def _key(bundle: Bundle, rivals: Sequence[Rival]) -> str:
    """16 hexadecimal digits that stand for the bundle, the processor, the cores that may be used, and the engines."""
    facts = {
        "model": [bundle.manifest.files.get(name, {}).get("sha256") for name in _model_files(bundle)],
        "processor": processor(),
        "cores": _cores(),
        "engines": {rival.name: _version(rival.package) for rival in rivals},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _model_files(bundle: Bundle) -> list[str]:
    graphs = [str(graph.get("file")) for graph in bundle.manifest.graphs.values()]
    return sorted([*graphs, str(bundle.manifest.weights.get("file"))])


def _version(package: str | None) -> str:
    """Without importing the engine, which takes a while and is not needed for the one that is not taken."""
    try:
        return version(str(package))
    except PackageNotFoundError:
        return "unknown"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _milliseconds(found: object) -> float:
    if found is None:
        return math.inf
    if isinstance(found, bool) or not isinstance(found, int | float) or not found > 0:
        raise ValueError(f"{found!r:.40} is no time")
    return float(found)


def _file(key: str) -> str:
    return f"choice-{key}.json"
