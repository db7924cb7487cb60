"""Keeps a run in a folder: films, every inference and action as JSON lines, plots.

steps.jsonl           one object a line: {"event": "episode" | "inference" | "step" | "end", ...}
episode_000.mp4       the robot's film (GIF without imageio-ffmpeg), at its control rate
actions_000.png       executed actions; for a replay, with the recorded ones
latency.png           every latency of an inference by stage
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ki_edge.errors import RobotError

from . import plots
from .film import Film, open_film
from .loop import F32, Watcher
from .robots.base import Robot
from .robots.replay import ReplayRobot
from .telemetry import Episode


class Recorder(Watcher):
    """Writes into `folder`, which is made if it does not exist. RobotError if it cannot be written.

    `notes`: lines for the user, such as what could not be drawn. `films`: episodes that are filmed, from the first.
    """

    def __init__(self, folder: str | Path, *, films: int = 10) -> None:
        self.folder = Path(folder)
        self.notes: list[str] = []
        self._films = films
        self._film: Film | None = None
        self._actions: list[F32] = []
        self._inferences: list[int] = []
        self._timings: dict[str, list[float]] = {}
        self._robot: Robot | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._log: TextIO = (self.folder / "steps.jsonl").open("w", encoding="utf-8")
        except OSError as error:
            raise RobotError(f"cannot record into {self.folder}: {error.strerror}; choose another folder") from error
        if not plots.can_plot():
            self.notes.append(plots.MISSING)

    def episode_started(self, index: int, seed: int, robot: Robot) -> None:
        self._robot, self._actions, self._inferences = robot, [], []
        self._write("episode", index=index, seed=seed, robot=robot.name)
        if index < self._films:
            self._film = open_film(self.folder / f"episode_{index:03d}", robot.control_hz)
            self._add_frame(robot)

    def inferred(self, step: int, observation: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        self._inferences.append(step)
        for stage, milliseconds in result["timing"].items():
            self._timings.setdefault(stage, []).append(milliseconds)
        seen = {key: np.asarray(observation[key]).tolist() for key in ("state", "prompt") if key in observation}
        self._write("inference", step=step, **seen, timing=result["timing"], actions=_rounded(result["actions"]))

    def stepped(self, step: int, action: F32, robot: Robot) -> None:
        self._actions.append(action)
        self._write("step", step=step, action=_rounded(action))
        self._add_frame(robot)

    def episode_ended(self, index: int, episode: Episode) -> None:
        self._write("end", **asdict(episode))
        self._close_film()
        if plots.can_plot() and self._actions:
            robot = self._robot
            recorded = robot.recorded if isinstance(robot, ReplayRobot) else None
            title = f"Episode {index}, seed {episode.seed}"
            path = self.folder / f"actions_{index:03d}.png"
            plots.plot_actions(path, np.stack(self._actions), self._inferences, recorded, title)

    def close(self) -> None:
        self._close_film()
        self._log.close()
        if plots.can_plot() and self._timings:
            plots.plot_latency(self.folder / "latency.png", self._timings)

    def _add_frame(self, robot: Robot) -> None:
        frame = robot.frame() if self._film is not None else None
        if self._film is not None and frame is not None:
            self._film.add(frame)

    def _close_film(self) -> None:
        if self._film is not None:
            self._film.close()
            self._film = None

    def _write(self, event: str, **fields: Any) -> None:
        self._log.write(json.dumps({"event": event, **fields}) + "\n")


def _rounded(actions: Any) -> Any:
    return np.round(np.asarray(actions, np.float64), 6).tolist()
