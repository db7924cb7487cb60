"""A robot of LeRobot: `lerobot:TYPE`, through LeRobot's own `Robot` interface, in LeRobot's own environment.

Its connection, motors, cameras and limits (`max_relative_target`) stay LeRobot's; only dicts pass between the two.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ki_edge.commands import tell
from ki_edge.errors import RobotError
from ki_edge.policy.contract import PolicyContract

from .base import EpisodeStatus, checked_action
from .classes import import_module
from .forms import ObservationForm
from .lerobot_mapping import Mapped, read_mapping

INSTALL = (
    "LeRobot is not installed in this Python ({}): it brings torch and its own pins, so install the ki-edge wheel "
    "with [ort] into LeRobot's environment, and start ki-run there"
)
CHANGED = 1e-3  # of a command: LeRobot sent another one


class LerobotRobot:
    """`device`: a connected, calibrated `lerobot.robots.Robot`; `mapped`: its keys, checked against its features.

    `sent`: what LeRobot really sent at the last command, f32 [a] in the policy's order; None before the first.
    """

    def __init__(self, device: Any, mapped: Mapped, name: str, *, prompt: str | None = None) -> None:
        self.name, self._device, self._mapped = name, device, mapped
        self.action_names, self.control_hz = mapped.action_names, mapped.control_hz
        self.sent: NDArray[np.float32] | None = None
        self._prompt = mapped.prompt if prompt is None else prompt
        self._form = ObservationForm(mapped.cameras)
        self._seen: Mapping[str, Any] = {}
        self._steps, self._told = 0, False

    @classmethod
    def open(cls, spec: str, config: Mapping[str, Any], *, prompt: str | None = None) -> LerobotRobot:
        """Connect to the robot "TYPE" or "MODULE:TYPE". RobotError says what is missing, wrong or not calibrated.

        Nothing is ever calibrated from here: that moves joints, and asks questions on the terminal.
        """
        name = f"lerobot:{spec}"
        device = _make(spec, config.get("robot", {}), name)
        mapped = read_mapping(config, device.observation_features, device.action_features, name)
        try:
            device.connect(calibrate=False)
            if not device.is_calibrated:
                raise RobotError(
                    f"{name} is not calibrated (id {device.id!r:.60}): run lerobot-calibrate --robot.type="
                    f"{device.name} --robot.id={device.id} with its other fields, then start again"
                )
        except BaseException as error:
            _leave(device)
            if isinstance(error, Exception) and not isinstance(error, RobotError):
                reason = " ".join(str(error).split())[:300]
                raise RobotError(f"{name} cannot be connected: {type(error).__name__}: {reason}") from error
            raise
        return cls(device, mapped, name, prompt=prompt)

    def fit(self, contract: PolicyContract) -> None:
        """Give observations in the form of this contract from now on. RobotError if the mapping lacks a part of it."""
        self._form.fit(contract, self.name, len(self._mapped.state), len(self._mapped.actions))

    def reset(self, seed: int | None = None) -> None:
        """Count steps anew. LeRobot's robots have no start to go to: what an episode starts from is up to people."""
        self._steps = 0

    def observe(self) -> dict[str, Any]:
        """The state and the pictures of the policy's cameras. RobotError if LeRobot's observation lacks one."""
        self._seen = seen = self._ask("get_observation")
        keys = [*self._mapped.state, *(self._mapped.cameras[name] for name in self._form.cameras)]
        if missing := [key for key in keys if key not in seen]:
            raise RobotError(f"{self.name}: the observation has no {', '.join(missing)}; it has {', '.join(seen)}")
        pictures = {name: np.asarray(seen[self._mapped.cameras[name]]) for name in self._form.cameras}
        return self._form.observation(pictures, self._state(seen), self._prompt)

    def act(self, action: NDArray[np.float32]) -> None:
        """Send one action f32 [a]; what LeRobot made of it is in `sent`, and told once where it is another."""
        values = checked_action(action, len(self._mapped.actions), self.name)
        command = {key: float(value) for key, value in zip(self._mapped.actions, values, strict=True)}
        self._send({**command, **self._mapped.fixed})
        self._steps += 1
        assert self.sent is not None
        apart = np.abs(self.sent - values) > CHANGED * np.maximum(1.0, np.abs(values))
        if apart.any() and not self._told:
            self._told = True
            at = int(np.argmax(apart))
            tell(
                f"{self.name} sent {self._mapped.actions[at]} {self.sent[at]:.4g} instead of {values[at]:.4g}, as its "
                "own limits say (max_relative_target); further ones are not told"
            )

    def hold(self) -> None:
        """Stand still for one control period: positions as they were sent last, velocities zero."""
        if self.sent is not None:
            last = zip(self._mapped.actions, map(float, self.sent), strict=True)
            self._send({key: 0.0 if _is_velocity(key) else value for key, value in last} | self._still_fixed())

    def safe_stop(self) -> None:
        """Command every position to where the joint is now, and every velocity to zero. A joint whose position is not
        observed keeps its last command; before the first command nothing is sent.
        """
        if self.sent is None:
            return
        if any(map(_is_velocity, (*self._mapped.actions, *self._mapped.fixed))):
            self.hold()  # before the cameras are asked, which may take their time
        try:
            seen = self._ask("get_observation")
        except RobotError:  # of a camera that is gone: the arm is to come to rest all the same
            seen = {}
        last = dict(zip(self._mapped.actions, map(float, self.sent), strict=True))
        here = {key: _number(seen.get(key), value) for key, value in last.items()}
        self._send({key: 0.0 if _is_velocity(key) else value for key, value in here.items()} | self._still_fixed())

    def status(self) -> EpisodeStatus:
        """Done after the configuration's max_steps, if there are any; whether it succeeded is not known."""
        most = self._mapped.max_steps
        return EpisodeStatus(most is not None and self._steps >= most, None, self._steps)

    def frame(self) -> NDArray[np.uint8] | None:
        """The film camera's picture of the last observation, RGB u8 [h, w, 3]."""
        key = None if self._mapped.film is None else self._mapped.cameras[self._mapped.film]
        picture = None if key is None else self._seen.get(key)
        return None if picture is None else np.asarray(picture, np.uint8)

    def close(self) -> None:
        """Disconnect; LeRobot lets the motors go limp where its configuration says so. A second time does nothing."""
        device, self._device = self._device, None
        if device is not None and device.is_connected:
            device.disconnect()

    def _ask(self, method: str, *arguments: Any) -> Mapping[str, Any]:
        """What LeRobot answers. RobotError for its errors, which are of many kinds, and where it is closed."""
        if self._device is None:
            raise RobotError(f"{self.name} is closed")
        try:
            answer = getattr(self._device, method)(*arguments)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise RobotError(f"{self.name}: {method} failed: {type(error).__name__}: {reason}") from error
        return answer if isinstance(answer, Mapping) else {}

    def _state(self, seen: Mapping[str, Any]) -> NDArray[np.float32]:
        return np.array([float(seen[key]) for key in self._mapped.state], np.float32)

    def _send(self, command: dict[str, float]) -> None:
        really = self._ask("send_action", command)
        self.sent = np.array([_number(really.get(key), command[key]) for key in self._mapped.actions], np.float32)

    def _still_fixed(self) -> dict[str, float]:
        return {key: 0.0 if _is_velocity(key) else value for key, value in self._mapped.fixed.items()}


def _make(spec: str, fields: Any, name: str) -> Any:
    """The device of a type, not connected. RobotError if there is no such type, or its configuration is wrong."""
    module, _, kind = spec.rpartition(":")
    try:
        import draccus
        from lerobot.robots import RobotConfig, make_robot_from_config
    except ModuleNotFoundError as error:
        raise RobotError(f"{name}: {INSTALL.format(sys.executable)} ({error.name} is missing)") from error
    if module:
        import_module(module, f"robot {name!r:.80}")
    known = RobotConfig.get_known_choices
    _register(kind, known)
    if kind not in known():
        raise RobotError(f"LeRobot has no robot {kind!r:.60}; it has {', '.join(sorted(known()))}")
    if not isinstance(fields, Mapping):
        raise RobotError(f"robot configuration: robot is {fields!r:.60}, expected LeRobot's fields of a {kind}")
    try:
        return make_robot_from_config(draccus.decode(RobotConfig, {**fields, "type": kind}))
    except Exception as error:  # of draccus, of the type's own checks, of drivers that are not installed
        reason = " ".join(str(error).split())[:400]
        raise RobotError(f"{name} cannot be made of its configuration: {type(error).__name__}: {reason}") from error


def _register(kind: str, known: Any) -> None:
    """Import what registers robots, until the type is there: plugins (lerobot_robot_...), then LeRobot's own."""
    import lerobot.robots
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    for found in pkgutil.iter_modules(lerobot.robots.__path__, "lerobot.robots."):
        if kind in known():
            return
        if found.ispkg:
            try:
                importlib.import_module(found.name)
            except Exception:  # the driver of another robot is not installed
                continue


def _is_velocity(key: str) -> bool:
    return key.rpartition(".")[2] == "vel"


def _number(value: Any, otherwise: float) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        return otherwise
    return found if math.isfinite(found) else otherwise


def _leave(device: Any) -> None:
    try:
        if device.is_connected:
            device.disconnect()
    except Exception:
        return
