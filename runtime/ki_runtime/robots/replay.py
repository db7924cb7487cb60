"""Recorded episodes as a robot: `replay:FILE` shows their observations and keeps the actions predicted for them.

FILE is an .npz episode (`ki_edge.recordings.episode_file`; `record_episode` writes one), a folder of them, or a
LeRobotDataset, such as `ki-run --record` writes.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ki_edge.errors import DatasetError, RobotError
from ki_edge.policy.contract import PolicyContract
from ki_edge.recordings.collection import open_recordings
from ki_edge.recordings.episode_file import header_fault, value_fault
from ki_edge.recordings.episodes import EpisodeView

from .base import EpisodeStatus, checked_action

CONTROL_HZ = 25.0  # of a recording for which nobody says it


class ReplayRobot:
    """Open loop: `act` stores the predicted action and moves on to the next recorded step.

    The seed of a reset chooses the episode: seed modulo their number. Observations are generic until `fit` names a
    contract. Attributes: `recorded` f32 [T, a], the actions of the present episode; `predicted` f32 [T, a], NaN where
    none was given yet. RobotError if the file is unfit.
    """

    real_time = False  # it waits for its actions

    def __init__(
        self, path: str | os.PathLike[str], *, prompt: str | None = None, control_hz: float | None = None
    ) -> None:
        self.name = f"replay:{os.fspath(path)}"
        self.control_hz = control_hz or CONTROL_HZ
        self._hz_given, self._prompt = control_hz is not None, prompt
        self._contract: PolicyContract | None = None
        try:
            self._recordings = open_recordings(path)
        except DatasetError as error:
            raise RobotError(str(error)) from None
        self._number, self._view = 0, self._opened(0)
        self.reset()

    def fit(self, contract: PolicyContract) -> None:
        """Give observations in the form of this contract from now on. RobotError if the recording lacks a part."""
        try:
            self._view = EpisodeView(self._view.episode, contract)
        except DatasetError as error:
            raise RobotError(str(error)) from None
        self._contract = contract
        if contract.control_hz is not None and not self._hz_given:
            self.control_hz = contract.control_hz

    def reset(self, seed: int | None = None) -> None:
        """To the first step of episode `seed` modulo their number, the present one without; forgets the predictions."""
        number = self._number if seed is None else seed % len(self._recordings)
        if number != self._number:
            self._number, self._view = number, self._opened(number)
        self.recorded = self._view.episode.actions
        self._step = 0
        self.predicted = np.full_like(self.recorded, np.nan)

    def observe(self) -> dict[str, Any]:
        """The recorded observation of the present step; after the end, that of the last one."""
        try:
            return self._view.observation(self._shown, self._prompt)
        except DatasetError as error:  # a film that is damaged further on
            raise RobotError(str(error)) from None

    def act(self, action: NDArray[np.float32]) -> None:
        """Store the action f32 [a] as the prediction of the present step."""
        values = checked_action(action, self.recorded.shape[1], self.name)
        if self._step >= len(self.recorded):
            raise RobotError(f"{self.name}: the recording has {len(self.recorded)} steps and is over; call reset()")
        self.predicted[self._step] = values
        self._step += 1

    def status(self) -> EpisodeStatus:
        """Done at the recording's end; whether it succeeded is not known."""
        return EpisodeStatus(self._step >= len(self.recorded), None, self._step)

    def frame(self) -> NDArray[np.uint8] | None:
        """The recorded pictures side by side where all are equally high, else the first one."""
        try:
            pictures = self._view.pictures(self._shown)
        except DatasetError as error:
            raise RobotError(str(error)) from None
        same = len({picture.shape[0] for picture in pictures}) == 1
        return np.concatenate(pictures, axis=1) if same else pictures[0]

    def close(self) -> None:
        """Nothing to release."""

    def _opened(self, number: int) -> EpisodeView:
        try:
            return EpisodeView(self._recordings.episode(number), self._contract)
        except DatasetError as error:
            raise RobotError(str(error)) from None

    @property
    def _shown(self) -> int:
        return min(self._step, len(self.recorded) - 1)


def record_episode(
    path: str | os.PathLike[str],
    *,
    images: Mapping[str, NDArray[np.uint8]],
    state: NDArray[np.float32],
    actions: NDArray[np.float32],
    prompt: str,
) -> None:
    """Write an episode of T steps: images {camera: u8 [T, h, w, 3]}, state f32 [T, s], actions f32 [T, a].

    The file appears complete or not at all.
    """
    arrays: dict[str, NDArray[Any]] = {f"images/{camera}": np.asarray(value) for camera, value in images.items()}
    arrays |= {"state": np.asarray(state), "actions": np.asarray(actions), "prompt": np.array(prompt)}
    target = Path(path)
    fault = header_fault({name: (array.shape, array.dtype) for name, array in arrays.items()}) or value_fault(arrays)
    if fault:
        raise RobotError(f"cannot record {target}: {fault}")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    temporary.replace(target)
