"""What a loop tells its watchers as the frames of a dataset: one for each command that was sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.errors import KiEdgeError
from ki_edge.policy.contract import PolicyContract
from ki_edge.policy.keys import under_contract_keys
from ki_edge.policy.transforms import given_pictures, read_prompt, read_state
from ki_runtime.recording.dataset import DatasetWriter, check_packages
from ki_runtime.recording.features import Features, Frame, camera_names
from ki_runtime.recording.video import even
from ki_runtime.robots.base import Robot

from .reporting import Step, Watcher
from .telemetry import Episode
from .verdict import REACTIONS

UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class _Seen:
    """The last observation that could be read."""

    tick: int
    pictures: dict[str, UInt8]
    state: npt.NDArray[np.float64]
    task: str


class DatasetRecorder(Watcher):
    """Writes a LeRobotDataset into `folder`. RobotError if the packages for it are missing or the disk fails.

    `every_tick`: the robot is observed at every tick. Else a frame between two observations of the policy has the
    pictures of the last one, which its `ki.picture_age` tells, and the state that the robot measured (without
    `measure`: the last one too). Cameras are those of the first observation of the run.
    """

    def __init__(self, folder: Path, *, every_tick: bool = False) -> None:
        check_packages()
        self._folder, self._every_tick = folder, every_tick
        self._contract: PolicyContract | None = None
        self._rate = 0.0
        self._writer: DatasetWriter | None = None
        self._seen: _Seen | None = None
        self._robot, self._seed = "", 0
        self._last: int | None = None  # tick of the last frame
        self._dropped = 0  # frames that were never told
        self._begun = False

    def observes(self, index: int) -> bool:
        return self._every_tick

    def run_started(self, contract: PolicyContract, rate: float) -> None:
        self._contract, self._rate = contract, rate

    def episode_started(self, index: int, seed: int, robot: Robot) -> None:
        self._robot, self._seed, self._begun = robot.name, seed, False
        self._seen, self._last, self._dropped = None, None, 0

    def observed(self, tick: int, observation: Mapping[str, Any]) -> None:
        contract = self._contract
        if contract is None:
            return
        try:
            state = read_state(contract, under_contract_keys(contract, observation))
            pictures = {key: even(picture) for key, picture in given_pictures(contract, observation).items()}
            task = read_prompt(contract, under_contract_keys(contract, observation))
        except KiEdgeError:  # the policy says what is wrong with it
            return
        names = camera_names([camera.key for camera in contract.cameras if camera.key is not None])
        named = {names[key]: picture for key, picture in pictures.items()}
        if self._writer is None:
            self._writer = DatasetWriter(self._folder, self._features(contract, named))
        before = {} if self._seen is None else self._seen.pictures
        fitting: dict[str, UInt8] = {}
        for name, size in self._writer.features.cameras.items():
            picture = named.get(name)
            if picture is not None and picture.shape[:2] == size:
                fitting[name] = picture.copy()  # the robot may draw over it
            else:  # gone for a moment, or of another size: LeRobot's frames have all their cameras
                fitting[name] = before[name] if name in before else np.zeros((*size, 3), np.uint8)
        self._seen = _Seen(tick, fitting, state, task)

    def stepped(self, step: Step) -> None:
        seen, writer = self._seen, self._writer
        if seen is None or writer is None or self._contract is None:
            return
        if not self._begun:
            writer.begin()
            self._begun = True
        if self._last is not None:
            self._dropped += step.tick - self._last - 1
        self._last = step.tick
        fresh = seen.tick == step.tick
        state = seen.state if fresh or step.measured is None else step.measured
        frame = Frame(
            tick=step.tick,
            time=step.time,
            state=np.asarray(state, np.float32),
            action=step.action,
            planned=step.action if step.planned is None else step.planned,
            pictures=seen.pictures,
            picture_age=max(0, step.tick - seen.tick) / self._rate,
            chunk=step.chunk,
            row=step.index,
            age=step.age,
            seam=step.seam,
            guards=step.guards,
            task=seen.task,
        )
        try:
            writer.add(frame)
        except BaseException:
            self._forget()
            raise

    def episode_ended(self, index: int, episode: Episode) -> None:
        outcome = {name: getattr(episode, name) for name in ("success", "success_any", "reached", "inferences")}
        self._finish({**outcome, "seconds": episode.seconds, "stopped": False})

    def close(self) -> None:
        """Commit also an episode that was stopped: how it would have ended is not known."""
        self._finish({"stopped": True})

    def _finish(self, outcome: Mapping[str, Any]) -> None:
        if self._writer is None or not self._begun:
            return
        self._begun = False
        facts = {**outcome, "seed": self._seed, "dropped": self._dropped}
        self._writer.finish({f"ki.{name}": value for name, value in facts.items()})

    def _forget(self) -> None:
        """Nothing more of this episode: what is on the disk of it goes, the episodes before stay."""
        self._begun, self._seen = False, None
        if self._writer is not None:
            self._writer.discard()

    def _features(self, contract: PolicyContract, pictures: Mapping[str, UInt8]) -> Features:
        names = contract.action_names or tuple(f"action_{i}" for i in range(contract.action_dim))
        sizes = {name: (picture.shape[0], picture.shape[1]) for name, picture in pictures.items()}
        return Features(self._rate, self._robot, contract.state_dim, names, sizes, tuple(REACTIONS))
