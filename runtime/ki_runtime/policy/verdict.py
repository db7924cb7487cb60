"""What the witness found of an engine, as a record that is kept: figures, what they hold for, when they were taken.

A record is one JSON file whose name is a hash of its environment, beside the engine it is about; in the user's cache
where the bundle cannot be written; in this process alone where nothing can.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ki_edge.errors import BackendError
from ki_edge.files.reading import read_object
from ki_edge.files.writing import write_file
from ki_runtime.backends.records import places

SCHEMA = 1
MOST_BYTES = 1 << 18  # of a record, which takes a few thousand
ACTIONS, FAST = "actions", "fast"
_unwritten: dict[str, Verdict] = {}


@dataclass(frozen=True)
class Row:
    """One observation. Errors of the actions run step by step (`eager`) and as a recorded sequence, and their bars.

    `cosine`: 1 - cosine of the angle to the reference. `apart`: the largest difference between any two runs. Of a FAST
    row, `eager` and `recorded` are the numbers of tokens that are not the reference's, `allowed` 0. A figure that was
    not taken is None; one that is not finite is infinite.
    """

    what: str
    eager: float
    recorded: float | None
    allowed: float
    cosine: float = 0.0
    cosine_allowed: float = 0.0
    apart: float | None = 0.0
    apart_allowed: float = 0.0

    @property
    def passed(self) -> bool:
        pairs = (
            (self.eager, self.allowed),
            (self.recorded, self.allowed),
            (self.cosine, self.cosine_allowed),
            (self.apart, self.apart_allowed),
        )
        return all(found is not None and found <= allowed for found, allowed in pairs)

    @property
    def worst(self) -> float:
        """The larger error; infinite if the sequence was not run."""
        return max(self.eager, math.inf if self.recorded is None else self.recorded)


@dataclass(frozen=True)
class Verdict:
    """`part`: "actions" or "fast". `environment`: everything that it holds for. `date`: UTC, ISO 8601."""

    part: str
    environment: Mapping[str, str]
    date: str
    rows: tuple[Row, ...] = field(default=())

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(row.passed for row in self.rows)

    @property
    def key(self) -> str:
        """Name of the record."""
        return key_of(self.part, self.environment)

    def figures(self) -> str:
        """One line: the observation closest to its bars, or the furthest beyond them."""
        row = max(self.rows, key=_severity)
        if self.part == FAST:
            wrong = int(row.worst) if math.isfinite(row.worst) else "all"
            return f"FAST tokens of {row.what}: " + (f"{wrong} differ" if wrong else "identical")
        if row.recorded is None:
            runs = "not recorded, since it is wrong step by step"
        else:
            runs = f"recorded {row.recorded:.1e}"
        apart = "" if row.apart is None else f", runs {row.apart:.1e} apart (allowed {row.apart_allowed:.0e})"
        return (
            f"max abs error step by step {row.eager:.1e}, {runs} (allowed {row.allowed:.0e}), "
            f"cosine {1 - row.cosine:.9g} (least {1 - row.cosine_allowed:.9g}){apart}; {row.what}"
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON values, `from_json` reads them. Infinity is written as a word."""
        rows = [{name: _plain(value) for name, value in row.__dict__.items()} for row in self.rows]
        environment = dict(self.environment)
        head = {"schema": SCHEMA, "part": self.part, "passed": self.passed, "date": self.date}
        return {**head, "environment": environment, "observations": rows}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str) -> Verdict:
        """BackendError if it is no verdict."""
        try:
            if content["schema"] != SCHEMA:
                raise ValueError(f"schema {content['schema']!r:.20}")
            environment = {str(name): str(value) for name, value in content["environment"].items()}
            rows = tuple(_row(found) for found in content["observations"])
            found = cls(str(content["part"]), environment, str(content["date"])[:40], rows)
            if found.passed is not content["passed"]:
                raise ValueError("its figures and its verdict disagree")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BackendError(f"{where} is not a verdict ({error!r:.80})") from None
        return found


def table(verdicts: Sequence[Verdict]) -> list[str]:
    """For people: what was compared with what, a line an observation, and the outcome."""
    environment, lines = verdicts[0].environment, []
    about = ", ".join(
        f"{name} {environment[name]}" for name in environment if name not in ("witness", "model", "backend", "GPU id")
    )
    lines.append(f"backend {environment['backend']}: {about}")
    lines.append(f"{'observation':28} {'by steps':>9} {'recorded':>9} {'allowed':>9} {'cosine':>12} {'apart':>9}")
    for verdict in verdicts:
        for row in verdict.rows:
            mark = "" if row.passed else "  FAILED"
            if verdict.part == FAST:
                outcome = "identical" if row.passed else "other tokens than the reference's"
                lines.append(f"{'FAST, ' + row.what:28} {outcome}{mark}")
                continue
            recorded, apart = (f"{'-':>9}" if x is None else f"{x:9.1e}" for x in (row.recorded, row.apart))
            figures = f"{row.eager:9.1e} {recorded} {row.allowed:9.1e} {1 - row.cosine:12.9f} {apart}"
            lines.append(f"{row.what:28} {figures}{mark}")
    passed = all(verdict.passed for verdict in verdicts)
    lines.append(f"{'proven' if passed else 'REFUSED'} on this machine, {verdicts[0].date}")
    return lines


def key_of(part: str, environment: Mapping[str, str]) -> str:
    """16 hexadecimal digits that stand for everything a verdict holds for."""
    return hashlib.sha256(json.dumps([part, dict(environment)], sort_keys=True).encode()).hexdigest()[:16]


def find(part: str, environment: Mapping[str, str], folder: Path) -> Verdict | None:
    """The verdict on exactly these environment; None if there is none that can be read."""
    key = key_of(part, environment)
    for path in _places(folder, key):
        with suppress(BackendError):
            found = Verdict.from_json(read_object(path, BackendError, MOST_BYTES), str(path))
            if (found.part, dict(found.environment)) == (part, dict(environment)):
                return found
    return _unwritten.get(key)


def keep(verdict: Verdict, folder: Path) -> Path | None:
    """Write a verdict down, whole or not at all; its path, or None if it is kept in this process alone."""
    text = json.dumps(verdict.to_json(), indent=1) + "\n"
    for path in _places(folder, verdict.key):
        with suppress(OSError, BackendError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, text, BackendError)
            _unwritten.pop(verdict.key, None)
            return path
    _unwritten[verdict.key] = verdict
    return None


def _places(folder: Path, key: str) -> Iterator[Path]:
    return places(folder, f"proof-{key}.json")


def _plain(value: Any) -> Any:
    return "infinite" if isinstance(value, float) and not math.isfinite(value) else value


def _row(content: Mapping[str, Any]) -> Row:
    values = {name: math.inf if value == "infinite" else value for name, value in content.items()}
    what = values.pop("what")
    numbers = {name: None if value is None else float(value) for name, value in values.items()}
    return Row(str(what)[:200], **numbers)  # type: ignore[arg-type]


def _severity(row: Row) -> float:
    pairs = ((row.worst, row.allowed), (row.cosine, row.cosine_allowed), (row.apart or 0.0, row.apart_allowed))
    return max(found / allowed if allowed else (math.inf if found else 0.0) for found, allowed in pairs)
