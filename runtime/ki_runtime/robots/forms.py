"""A robot's own cameras, state and sentence as the observation of whatever contract is to drive it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ki_edge.errors import RobotError
from ki_edge.policy.contract import Camera, PolicyContract
from ki_edge.policy.keys import under_contract_keys


class ObservationForm:
    """`cameras` of a robot, matched with those of a contract; without one, the generic form with all of them.

    A camera is the contract's by its key, by the key's last part if no other shares it, or by the model's slot.
    `cameras`: after that, the contract's key of each of the robot's cameras that is used.
    """

    def __init__(self, cameras: Iterable[str]) -> None:
        self._own = tuple(cameras)
        self._contract: PolicyContract | None = None
        self.cameras: dict[str, str] = {name: name for name in self._own}

    def fit(self, contract: PolicyContract, robot: str, states: int, actions: int) -> None:
        """From now on for this contract. RobotError if the robot lacks one of its cameras, or has another number of
        states or actions; it says what there is.
        """
        keys = [camera for camera in contract.cameras if camera.key is not None]
        ends = [_end(camera.key) for camera in keys]
        found = {}
        for camera in keys:
            own = next((name for name in _names(camera, ends) if name in self._own and name not in found), None)
            if own is not None:
                found[own] = str(camera.key)
            elif camera.required:
                wanted = ", ".join(str(key.key) + ("" if key.required else " (optional)") for key in keys)
                raise RobotError(
                    f"{robot} has no camera {camera.key}: it has {', '.join(self._own) or 'none'}, and the policy "
                    f"needs {wanted}; name them so in its configuration (--robot-config FILE)"
                )
        for what, has, wants in (("state", states, contract.state_dim), ("action", actions, contract.action_dim)):
            if has != wants:
                raise RobotError(
                    f"{robot} has {has} numbers in its {what}, and the policy's contract has {wants}: change the "
                    f"{what} in its configuration (--robot-config FILE)"
                )
        self._contract, self.cameras = contract, found

    def observation(self, pictures: Mapping[str, Any], state: Any, prompt: str | None) -> dict[str, Any]:
        """The observation; `pictures` by the robot's own names, of those cameras that are used."""
        said = {} if prompt is None else {"prompt": prompt}
        if self._contract is None:
            return {"images": dict(pictures), "state": state, **said}
        named = {f"observation.images.{self.cameras[name]}": picture for name, picture in pictures.items()}
        return dict(under_contract_keys(self._contract, {**named, "observation.state": state, **said}))


def _names(camera: Camera, ends: list[str]) -> list[str]:
    assert camera.key is not None
    end = _end(camera.key)
    return [camera.key, *([end] if ends.count(end) == 1 else []), camera.slot]


def _end(key: str | None) -> str:
    return re.split(r"[/.]", str(key))[-1]
