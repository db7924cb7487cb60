"""A recorded episode as a policy's observations: what a replay shows, and what an export calibrates on."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.errors import DatasetError
from ki_edge.policy.contract import Camera, PolicyContract
from ki_edge.policy.transforms import UNUSED_CAMERAS

from .episode_file import Pictures, RecordedEpisode

UInt8 = npt.NDArray[np.uint8]


class EpisodeView:
    """The observations of an episode in the form of a contract (`ki_edge.policy.transforms`); generic without one.

    DatasetError if the recording has not what the policy needs; it names what the file has and what is wanted.
    """

    def __init__(self, episode: RecordedEpisode, contract: PolicyContract | None = None) -> None:
        self.episode = episode
        self._contract = contract
        self._pictures: dict[str, Pictures] = dict(episode.cameras)
        if contract is not None:
            self._pictures = _matched(episode, contract)
            for name, is_, wanted in (
                ("state", episode.state.shape[1], contract.state_dim),
                ("actions", episode.actions.shape[1], contract.action_dim),
            ):
                if is_ != wanted:
                    raise _unfit(episode, contract, f"{is_} numbers in {name}, expected {wanted}")

    def __len__(self) -> int:
        return len(self.episode)

    def observation(self, step: int, prompt: str | None = None) -> dict[str, Any]:
        """The observation of a step; `prompt` instead of the recorded one."""
        images = {key: pictures[step].copy() for key, pictures in self._pictures.items()}
        state = self.episode.state[step].copy()
        robot = "generic" if self._contract is None else self._contract.robot
        found: dict[str, Any]
        if robot == "droid":
            joints, gripper = state[:-1], state[-1:]
            found = {**images, "observation/joint_position": joints, "observation/gripper_position": gripper}
        elif robot == "libero":
            found = {**images, "observation/state": state}
        else:
            found = {"images": images, "state": state}
        prompt = self.episode.prompt if prompt is None else prompt
        return found if prompt is None else {**found, "prompt": prompt}

    def pictures(self, step: int) -> list[UInt8]:
        """The step's pictures u8 [h, w, 3], by camera."""
        found = [self._pictures[key][step] for key in sorted(self._pictures)]
        return [picture if picture.shape[2] == 3 else picture.transpose(1, 2, 0) for picture in found]


def _matched(episode: RecordedEpisode, contract: PolicyContract) -> dict[str, Pictures]:
    """Pictures by the key under which the contract's observations have them."""
    left, found = dict(episode.cameras), dict[str, Pictures]()
    ends = [_end(camera.key) for camera in contract.cameras if camera.key is not None]
    for camera in contract.cameras:
        if camera.key is None:
            continue
        name = next((name for name in _names(camera, ends) if name in left), None)
        if name is not None:
            found[camera.key] = left.pop(name)
        elif camera.required:
            raise _unfit(episode, contract, f"no pictures of camera {camera.key}")
    unused = UNUSED_CAMERAS | {_end(name) for name in UNUSED_CAMERAS}
    if unknown := sorted(left.keys() - unused):
        raise _unfit(episode, contract, f"pictures of {', '.join(unknown)}, a camera that the policy does not have")
    return found


def _names(camera: Camera, ends: list[str]) -> list[str]:
    """Under which names a recording may have a camera: its key (in a LeRobotDataset with dots for slashes), the key's
    last part if no other shares it, its slot.
    """
    assert camera.key is not None
    end = _end(camera.key)
    dotted = camera.key.removeprefix("observation/").replace("/", ".")
    return [camera.key, dotted, *([end] if ends.count(end) == 1 else []), camera.slot]


def _end(key: str) -> str:
    return re.split(r"[/.]", key)[-1]


def _unfit(episode: RecordedEpisode, contract: PolicyContract, what: str) -> DatasetError:
    keys = ", ".join(
        camera.key + ("" if camera.required else " (optional)") for camera in contract.cameras if camera.key
    )
    return DatasetError(
        f"{episode.where}: {what}. The file has {episode.contents}; this {contract.robot} policy needs the cameras "
        f"{keys}, state [T, {contract.state_dim}] and actions [T, {contract.action_dim}]"
    )
