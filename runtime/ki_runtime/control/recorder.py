"""Keeps a run in a folder: a LeRobotDataset, films, every inference and action as JSON lines, plots, a page.

meta/, data/, videos/ the dataset: a frame for every command, see `ki_runtime.recording.features`
run.html              the run to look at: films, actions, chunks, latency, guards
steps.jsonl           one object a line: {"event": "episode" | "inference" | "step" | "end", ...}
episode_000.mp4       the robot's film (GIF without imageio-ffmpeg), at its control rate
actions_000.png       executed actions; for a replay, with the recorded ones
latency.png           every latency of an inference by stage

A run that is stopped leaves the same files, up to where it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from ki_edge.errors import RobotError
from ki_edge.files.writing import writing
from ki_edge.policy.contract import PolicyContract
from ki_runtime.recording import plots
from ki_runtime.recording.film import Film, open_film
from ki_runtime.recording.page import LOG, write_page
from ki_runtime.robots.base import Robot
from ki_runtime.robots.replay import ReplayRobot

from .dataset_recorder import DatasetRecorder
from .reporting import Step, Watcher
from .schedule import F32
from .self_check import Checked
from .telemetry import Episode

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
    and plotted. `dataset`: also a LeRobotDataset, which needs pyarrow and av (RobotError without them); `every_tick`:
    for it the robot is observed at every tick, see `DatasetRecorder`.
    """

    def __init__(self, folder: str | Path, *, films: int = 10, dataset: bool = True, every_tick: bool = False) -> None:
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
        self._names: tuple[str, ...] | None = None  # of an action's numbers
        self._rate: float | None = None
        check_folder(folder)
        self._dataset = DatasetRecorder(self.folder, every_tick=every_tick) if dataset else None
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

    def observes(self, index: int) -> bool:
        return self._dataset is not None and self._dataset.observes(index)

    def run_started(self, contract: PolicyContract, rate: float) -> None:
        self._names, self._rate = contract.action_names, rate
        if self._dataset is not None:
            self._dataset.run_started(contract, rate)

    def episode_started(self, index: int, seed: int, robot: Robot) -> None:
        self._index, self._seed, self._actions, self._inferences = index, seed, [], []
        self._recorded = robot.recorded if isinstance(robot, ReplayRobot) else None
        facts = {"index": index, "seed": seed, "robot": robot.name, "rate": self._rate, "names": self._names}
        self._write("episode", {**facts, "recorded": None if self._recorded is None else _rounded(self._recorded)})
        if self._dataset is not None:
            self._dataset.episode_started(index, seed, robot)
        if self.films(index):
            self._film = open_film(self.folder / f"episode_{index:03d}", getattr(robot, "control_hz", None) or FILM_HZ)

    def filmed(self, frame: npt.NDArray[np.uint8]) -> None:
        if self._film is not None:
            self._film.add(frame)

    def observed(self, tick: int, observation: Mapping[str, Any]) -> None:
        if self._dataset is not None:
            self._dataset.observed(tick, observation)

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
        facts["time"] = round(step.time, 4)
        if step.guards:
            facts |= {"guards": step.guards, "planned": _rounded(step.planned)}
        self._write("step", facts)
        if self._dataset is not None:
            self._dataset.stepped(step)

    def checked(self, found: Checked) -> None:
        apart = round(found.disagreement, 6) if np.isfinite(found.disagreement) else None
        facts = {"step": found.tick, "disagreement": apart, "beyond": found.beyond, "problem": found.problem}
        self._write("check", {**facts, "ms": round(found.milliseconds, 2)})

    def episode_ended(self, index: int, episode: Episode) -> None:
        if self._dataset is not None:
            self._dataset.episode_ended(index, episode)
        self._write("end", asdict(episode))
        self._finish_episode()

    def close(self) -> None:
        """Finish the film, also that of an episode that was stopped, and draw the plots: they take too long before."""
        try:
            if self._dataset is not None:
                self._dataset.close()
        finally:
            self._finish_files()

    def _finish_files(self) -> None:
        try:
            self._finish_episode()
        finally:
            self._log.close()
            if plots.can_plot():
                for name, *drawn in self._plots:
                    plots.plot_actions(self.folder / name, *drawn)
                if self._timings:
                    plots.plot_latency(self.folder / "latency.png", self._timings)
            write_page(self.folder)

    def _finish_episode(self) -> None:
        film, self._film = self._film, None
        actions, self._actions = self._actions, []
        if actions and self.films(self._index):
            title = f"Episode {self._index}, seed {self._seed}"
            name = f"actions_{self._index:03d}.png"
            self._plots.append((name, np.stack(actions), self._inferences, self._recorded, title, self._names))
        if film is not None:
            film.close()

    def _write(self, event: str, fields: Mapping[str, Any]) -> None:
        with writing(self.folder / LOG, RobotError):
            self._log.write(json.dumps({"event": event} | {**fields, "event": event}) + "\n")


def _small(given: object) -> object:
    """What the log keeps of an observation's entry: text and short lists of numbers, not pictures; None for others."""
    try:
        array = np.asarray(given)
    except (TypeError, ValueError):  # a tensor on a device, a ragged list
        return None
    if array.ndim > 1 or array.dtype.kind not in "biufU":
        return None
    values = array.tolist()
    if array.dtype.kind != "f":
        return values
    if array.ndim:
        return [value if math.isfinite(value) else None for value in values]  # JSON has no such numbers
    return values if math.isfinite(values) else None


def _rounded(actions: Any) -> Any:
    return np.round(np.asarray(actions, np.float64), 6).tolist()


def _seconds(age: float | None) -> float | None:
    return None if age is None else round(age, 4)
