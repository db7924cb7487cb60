"""The log of a run: one JSON line every so many steps, and one for each evaluation, in files that a kill cannot spoil.

    OUT/training/log.jsonl          {"step": 20, "flow": 0.31, "fast": 2.2, "samples_per_s": 41.0, ...}
    OUT/training/evaluation.jsonl   {"step": 500, "held_out_flow": 0.28, "robot_success": 0.7, ...}

A step stands in each of them once at most: what was logged after the step from which a run goes on is cut off first. A
number that is not finite is null, since JSON has no NaN.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.errors import CheckpointError
from ki_edge.files.reading import parse_json, read_file
from ki_edge.files.writing import write_file, writing

LOG, EVALUATIONS = "log.jsonl", "evaluation.jsonl"
MAX_LOG = 1 << 30  # bytes: millions of rows
MOST_TASKS = 24  # that a row tells of, each by itself
MOST_NAME = 60  # characters of a task in a column's name
Row = dict[str, Any]


class RunLog:
    """The two files in `folder` (OUT/training), open for rows after `step`: what they hold of later steps is dropped.

    CheckpointError if they cannot be written. `dropped`: lines that were no rows, such as the last one before a kill.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        with writing(folder, CheckpointError):
            folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.dropped = _cut(folder / LOG, step) + _cut(folder / EVALUATIONS, step)

    def append(self, row: Mapping[str, Any]) -> None:
        """A row of training; `step` is in it."""
        _append(self._folder / LOG, row)

    def append_evaluation(self, row: Mapping[str, Any]) -> None:
        """A row of an evaluation; `step` is in it."""
        _append(self._folder / EVALUATIONS, row)

    def rows(self) -> list[Row]:
        """All rows of training."""
        return read_rows(self._folder / LOG)

    def evaluations(self) -> list[Row]:
        """All rows of evaluations."""
        return read_rows(self._folder / EVALUATIONS)


def read_rows(path: Path) -> list[Row]:
    """The rows of a log, in the order of their steps, each step once (its last row); none without the file.

    Lines that are no rows are left out. CheckpointError for what cannot be read at all.
    """
    return _parse(path)[0]


def column(rows: Iterable[Row], name: str) -> npt.NDArray[np.float64]:
    """A column's numbers, NaN where a row has none."""
    values = [row.get(name) for row in rows]
    return np.array([value if isinstance(value, int | float) else math.nan for value in values], np.float64)


def by_group(
    flow: npt.ArrayLike,
    tokens: npt.ArrayLike,
    source: npt.ArrayLike,
    task: npt.ArrayLike,
    acts: npt.ArrayLike,
    *,
    names: Sequence[str],
    tasks: Sequence[str],
) -> dict[str, float]:
    """Means by dataset and by task of a step's samples: `flow/NAME`, `fast/NAME` or of a text set `text/NAME`,
    `task/TEXT`; none of one dataset.

    flow, tokens float [N], NaN where a sample has none; source, task int [N]; acts bool
    [N]: whether it is of actions, not text. Of the tasks the first MOST_TASKS.
    """
    flow, tokens = np.asarray(flow, np.float64), np.asarray(tokens, np.float64)
    source, task, acts = np.asarray(source), np.asarray(task), np.asarray(acts, np.bool_)
    found: dict[str, float] = {}
    if len(names) > 1:
        for index, name in enumerate(names):
            for term, values, own in (("flow", flow, acts), ("fast", tokens, acts), ("text", tokens, ~acts)):
                if known := _mean(values[own & (source == index)]):
                    found[f"{term}/{name}"] = known[0]
    if len(tasks) > 1:
        for index, text in enumerate(tasks[:MOST_TASKS]):
            if known := _mean(flow[task == index]):
                found[f"task/{_short(text, index)}"] = known[0]
    return found


def _mean(values: npt.NDArray[np.float64]) -> tuple[float, ...]:
    """The mean of what is known; nothing if nothing is."""
    known = values[~np.isnan(values)]
    return (float(known.mean()),) if known.size else ()


def _short(text: str, index: int) -> str:
    """A task's text; of a long one the beginning and its number, since others may begin alike."""
    return text if len(text) <= MOST_NAME else f"{text[: MOST_NAME - 1]}… ({index})"


def _append(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line, or nothing: a full disk must not leave half of one for the next row to continue."""
    line = (json.dumps(_finite(row), allow_nan=False) + "\n").encode()
    with writing(path, CheckpointError), path.open("ab", buffering=0) as file:
        before = file.seek(0, 2)
        try:
            written = file.write(line)
            if written != len(line):  # the rest says why not
                file.write(line[written:])
        except OSError:
            file.truncate(before)
            raise


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cut(path: Path, step: int) -> int:
    """Keep the rows up to a step, at once; returns how many lines were no rows."""
    if not path.exists():
        return 0
    rows, bad, lines = _parse(path)
    kept = [row for row in rows if row["step"] <= step]
    if bad or len(kept) != lines:
        write_file(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept), CheckpointError)
    return bad


def _parse(path: Path) -> tuple[list[Row], int, int]:
    """Rows by step, the number of lines that are none, the number of all lines."""
    if not path.exists():
        return [], 0, 0
    lines = read_file(path, MAX_LOG, CheckpointError).splitlines(keepends=True)
    found: dict[int, Row] = {}
    bad = 0
    for number, line in enumerate(lines, 1):
        row = _row(line, f"{path} line {number}") if line.endswith(b"\n") else None
        if row is None:
            bad += 1
        else:
            found[row["step"]] = row
    return [found[step] for step in sorted(found)], bad, len(lines)


def _row(line: bytes, where: str) -> Row | None:
    try:
        row = parse_json(line, where, CheckpointError)
    except CheckpointError:
        return None
    if not isinstance(row, dict):
        return None
    step = row.get("step")
    return row if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None
