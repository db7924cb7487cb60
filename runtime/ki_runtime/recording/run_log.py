"""A run read back from its steps.jsonl: what a page shows. Of long runs every number counts, but few are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.errors import DatasetError
from ki_edge.files.reading import parse_json

LOG = "steps.jsonl"
LONGEST = 64_000_000  # bytes of a line: one that has a replay's recorded actions
DRAWN = 10  # episodes whose steps are kept
KEPT = 20_000  # steps of them
Float = npt.NDArray[np.float64]


@dataclass(eq=False)
class EpisodeLog:
    """One episode. `steps`, `chunks`, `checks`: its first KEPT events of each kind; `end`: {} if it was stopped."""

    start: Mapping[str, Any]
    steps: list[Mapping[str, Any]] = field(default_factory=list)
    chunks: list[Mapping[str, Any]] = field(default_factory=list)
    checks: list[Mapping[str, Any]] = field(default_factory=list)
    end: Mapping[str, Any] = field(default_factory=dict)
    count: int = 0  # of all steps

    @property
    def index(self) -> int:
        """Its number in the run."""
        return int(self.start["index"])

    def column(self, name: str) -> Float:
        """A number of every kept step; NaN where it is null."""
        values = [step.get(name) for step in self.steps]
        return np.array([np.nan if value is None else value for value in values], np.float64)

    def actions(self) -> Float:
        """What was sent [steps, a]."""
        return np.array([step["action"] for step in self.steps], np.float64)


@dataclass(eq=False)
class RunLog:
    """All episodes; the steps of the first ones. `timings`: milliseconds by stage; `guards`: steps by kind."""

    episodes: list[EpisodeLog] = field(default_factory=list)
    timings: dict[str, list[float]] = field(default_factory=dict)
    guards: dict[str, int] = field(default_factory=dict)
    seams: list[float] = field(default_factory=list)  # largest change of an action from one step to the next, at seams
    inside: list[float] = field(default_factory=list)  # and elsewhere
    late: list[float] = field(default_factory=list)  # ms from one command to the next

    @classmethod
    def read(cls, folder: Path) -> RunLog:
        """DatasetError if the folder has no log of a run. A last line that was cut off is left out."""
        log, before = cls(), _Before()
        for event in _events(folder / LOG):
            try:
                log._add(event, before)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise DatasetError(f"{folder / LOG} is no log of a run: {type(error).__name__} in an event") from None
        return log

    def _add(self, event: Mapping[str, Any], before: _Before) -> None:
        kind = event["event"]
        if kind == "episode":
            self.episodes.append(EpisodeLog(event))
            before.forget()
            return
        if not self.episodes:
            return
        episode = self.episodes[-1]
        drawn = len(self.episodes) <= DRAWN
        if kind == "inference":
            for stage, value in event["timing"].items():
                self.timings.setdefault(str(stage), []).append(float(value))
            if drawn and len(episode.chunks) < KEPT:
                episode.chunks.append({"step": event["step"], "actions": event["actions"]})
        elif kind == "step":
            self._count(event, before)
            episode.count += 1
            if drawn and len(episode.steps) < KEPT:
                episode.steps.append(event)
        elif kind == "check":
            if drawn and len(episode.checks) < KEPT:
                episode.checks.append({name: event[name] for name in ("step", "disagreement", "beyond")})
        elif kind == "end":
            episode.end = event

    def _count(self, step: Mapping[str, Any], before: _Before) -> None:
        for kind in step.get("guards") or ():
            self.guards[str(kind)] = self.guards.get(str(kind), 0) + 1
        action, time = np.array(step["action"], np.float64), step.get("time")
        if before.action is not None:
            jump = float(np.abs(action - before.action).max(initial=0.0))
            (self.seams if step.get("seam") else self.inside).append(jump)
        if before.time is not None and time is not None:
            self.late.append(1e3 * (time - before.time))
        before.action, before.time = action, time


class _Before:
    """The step before."""

    action: Float | None = None
    time: float | None = None

    def forget(self) -> None:
        """A new episode."""
        self.action = self.time = None


def _events(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        with path.open("rb") as file:
            while line := file.readline(LONGEST):
                if not line.endswith(b"\n"):  # cut off with its process
                    return
                event = parse_json(line, f"a line of {path}", DatasetError)
                if not isinstance(event, dict):
                    raise DatasetError(f"{path} is no log of a run: a line is no object")
                yield event
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}; expected the folder of ki-run --record") from None
