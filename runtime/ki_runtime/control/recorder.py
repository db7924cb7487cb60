"""Keeps a run in a folder: films, every inference and action as JSON lines, plots.

steps.jsonl           one object a line: {"event": "episode" | "inference" | "step" | "end", ...}
episode_000.mp4       the robot's film (GIF without imageio-ffmpeg), at its control rate
actions_000.png       executed actions; for a replay, with the recorded ones
latency.png           every latency of an inference by stage

A run that is stopped leaves the same files, up to where it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from ki_edge.errors import RobotError
from ki_runtime.robots.base import Robot
from ki_runtime.robots.replay import ReplayRobot

from . import plots
from .film import Film, open_film
from .reporting import Step, Watcher
from .schedule import F32
from .telemetry import Episode

LOG = "steps.jsonl"
FILM_HZ = 25.0  # of a robot that does not tell its rate


def check_folder(folder: str | Path) -> None:
    """RobotError unless a run can be recorded into `folder`: a new or an empty one (hidden files do not count)."""
    path = Path(folder)
    try:
        there = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    except FileNotFoundError:
        return
    except OSError as error:
        raise RobotError(f"cannot record into {path}: {error.strerror}; choose another folder") from error
    if LOG in there:
        raise RobotError(f"{path} holds a recording already ({LOG}); choose another folder, or move that one away")
    if there:
        raise RobotError(f"{path} is not empty ({there[0]} is in it): record into a new or an empty folder")


class Recorder(Watcher):
    """Writes into `folder`, a new or empty one. RobotError if it is neither, or cannot be written.

    `notes`: lines for the user, such as what could not be drawn. `films`: so many episodes, the first ones, are filmed
    and plotted.
    """

    def __init__(self, folder: str | Path, *, films: int = 10) -> None:
        self.folder = Path(folder)
        self.notes: list[str] = []
        self._films = films
        self._film: Film | None = None
        self._index, self._seed = 0, 0
        self._actions: list[F32] = []
        self._inferences: list[int] = []
        self._timings: dict[str, list[float]] = {}
        self._plots: list[tuple[Any, ...]] = []  # what is drawn at the end
        self._recorded: F32 | None = None  # what a replay is compared with
        check_folder(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # a line at a time, so that nothing is lost with the process; never over another run's
            self._log: TextIO = (self.folder / LOG).open("x", encoding="utf-8", buffering=1)
        except OSError as error:
            raise RobotError(f"cannot record into {self.folder}: {error.strerror}; choose another folder") from error
        if not plots.can_plot():
            self.notes.append(plots.MISSING)

    def films(self, index: int) -> bool:
        """The first episodes are filmed, and plotted."""
        return index < self._films

    def episode_started(self, index: int, seed: int, robot: Robot) -> None:
        self._index, self._seed, self._actions, self._inferences = index, seed, [], []
        self._recorded = robot.recorded if isinstance(robot, ReplayRobot) else None
        self._write("episode", {"index": index, "seed": seed, "robot": robot.name})
        if self.films(index):
            self._film = open_film(self.folder / f"episode_{index:03d}", getattr(robot, "control_hz", None) or FILM_HZ)

    def filmed(self, frame: npt.NDArray[np.uint8]) -> None:
        if self._film is not None:
            self._film.add(frame)

    def inferred(self, step: int, observation: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        self._inferences.append(step)
        for stage, milliseconds in result["timing"].items():
            self._timings.setdefault(stage, []).append(milliseconds)
        seen = {str(key): value for key, given in observation.items() if (value := _small(given)) is not None}
        facts = {"step": step, "timing": result["timing"], "actions": _rounded(result["actions"])}
        if result.get("subtask") is not None:
            facts["subtask"] = result["subtask"]
        self._write("inference", {**seen, **facts})

    def stepped(self, step: Step) -> None:
        self._actions.append(step.action)
        facts: dict[str, Any] = {"step": step.tick, "action": _rounded(step.action)}
        facts |= {"chunk": step.chunk, "index": step.index, "age": _seconds(step.age), "seam": step.seam}
        if step.guards:
            facts |= {"guards": step.guards, "planned": _rounded(step.planned)}
        self._write("step", facts)

    def episode_ended(self, index: int, episode: Episode) -> None:
        self._write("end", asdict(episode))
        self._finish_episode()

    def close(self) -> None:
        """Finish the film, also that of an episode that was stopped, and draw the plots: they take too long before."""
        try:
            self._finish_episode()
        finally:
            self._log.close()
            if plots.can_plot():
                for name, *drawn in self._plots:
                    plots.plot_actions(self.folder / name, *drawn)
                if self._timings:
                    plots.plot_latency(self.folder / "latency.png", self._timings)

    def _finish_episode(self) -> None:
        film, self._film = self._film, None
        actions, self._actions = self._actions, []
        if actions and self.films(self._index):
            title = f"Episode {self._index}, seed {self._seed}"
            name = f"actions_{self._index:03d}.png"
            self._plots.append((name, np.stack(actions), self._inferences, self._recorded, title))
        if film is not None:
            film.close()

    def _write(self, event: str, fields: Mapping[str, Any]) -> None:
        self._log.write(json.dumps({"event": event} | {**fields, "event": event}) + "\n")


def _small(given: object) -> object:
    """What the log keeps of an observation's entry: text and short lists of numbers, not pictures; None for others."""
    try:
        array = np.asarray(given)
    except (TypeError, ValueError):  # a tensor on a device, a ragged list
        return None
    return array.tolist() if array.ndim < 2 and array.dtype.kind in "biufU" else None


def _rounded(actions: Any) -> Any:
    return np.round(np.asarray(actions, np.float64), 6).tolist()


def _seconds(age: float | None) -> float | None:
    return None if age is None else round(age, 4)
