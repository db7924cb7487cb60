"""An arm that exists in memory, as a plugin of LeRobot: `lerobot_robot_...`, which LeRobot imports by itself.

It logs every call to a file, moves at most `max_relative_target` a command, as LeRobot's arms do, and must be
calibrated unless its configuration says that it is.
"""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from lerobot.robots import Robot, RobotConfig

MOTORS = ("x", "y", "z", "left", "right")


@RobotConfig.register_subclass("wire_arm")
@dataclass(kw_only=True)
class WireArmConfig(RobotConfig):
    log: str
    calibrated: bool = True
    max_relative_target: float | None = None
    home: list[float] = field(default_factory=lambda: [1.34, 0.75, 0.53, 0.0, 0.0])
    fails_at: int | None = None  # number of the command that its bus does not take


class WireArm(Robot):
    config_class = WireArmConfig
    name = "wire_arm"

    def __init__(self, config: WireArmConfig):
        super().__init__(config)
        self.config, self._connected, self._commands = config, False, 0
        self._position = dict(zip(MOTORS, config.home, strict=True))

    @cached_property
    def observation_features(self):
        joints = {f"{motor}.pos": float for motor in MOTORS}
        return {**joints, "left_cam": (96, 96, 3), "right_cam": (96, 96, 3)}

    @cached_property
    def action_features(self):
        return {"x.pos": float, "y.pos": float, "z.pos": float, "gripper.pos": float, "base.vel": float}

    @property
    def is_connected(self):
        return self._connected

    @property
    def is_calibrated(self):
        return self.config.calibrated

    def connect(self, calibrate=True):
        self._log("connect", calibrate)
        self._connected = True
        if calibrate and not self.is_calibrated:
            self.calibrate()

    def calibrate(self):
        self._log("calibrate")

    def configure(self):
        pass

    def get_observation(self):
        joints = {f"{motor}.pos": value for motor, value in self._position.items()}
        picture = np.full((96, 96, 3), 100 + self._commands % 100, np.uint8)
        return {**joints, "left_cam": picture, "right_cam": picture.copy()}

    def send_action(self, action):
        self._commands += 1
        if self._commands == self.config.fails_at:
            raise ConnectionError("no answer from\nthe bus")
        most, sent = self.config.max_relative_target, dict(action)
        for motor in ("x", "y", "z"):
            here = self._position[motor]
            if most is not None:
                sent[f"{motor}.pos"] = here + min(max(action[f"{motor}.pos"] - here, -most), most)
            self._position[motor] = sent[f"{motor}.pos"]
        self._log("send", sent)
        return sent

    def disconnect(self):
        self._log("disconnect")
        self._connected = False

    def _log(self, *what):
        with Path(self.config.log).open("a") as file:
            file.write(json.dumps(what) + "\n")
