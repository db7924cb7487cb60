"""A robot of LeRobot that is not there: it stands where its last command was, and its cameras see a grey ramp.

Installed as the distribution lerobot_robot_dummy, LeRobot imports it by itself: --robot.type=dummy.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.robots.config import RobotConfig
from lerobot.robots.robot import Robot

STATE, ACTIONS = 8, 7
HEIGHT, WIDTH = 96, 128


@RobotConfig.register_subclass("dummy")
@dataclass
class DummyRobotConfig(RobotConfig):
    log: str = ""  # a file that gets a line for each command


class DummyRobot(Robot):
    config_class = DummyRobotConfig
    name = "dummy"

    def __init__(self, config: DummyRobotConfig) -> None:
        super().__init__(config)
        self.config = config
        self.connected = False
        self.positions = np.zeros(STATE, np.float32)
        self.cameras: dict[str, Any] = {}

    @property
    def observation_features(self) -> dict[str, Any]:
        joints = {f"joint_{i}.pos": float for i in range(STATE)}
        return {**joints, "front": (HEIGHT, WIDTH, 3), "wrist": (HEIGHT, WIDTH, 3)}

    @property
    def action_features(self) -> dict[str, Any]:
        return {f"joint_{i}.pos": float for i in range(ACTIONS)}

    @property
    def is_connected(self) -> bool:
        return self.connected

    @property
    def is_calibrated(self) -> bool:
        return True

    def connect(self, calibrate: bool = True) -> None:
        self.connected = True

    def calibrate(self) -> None:
        pass

    def configure(self) -> None:
        pass

    def get_observation(self) -> dict[str, Any]:
        ramp = np.broadcast_to(np.linspace(0, 255, WIDTH, dtype=np.uint8)[None, :, None], (HEIGHT, WIDTH, 3))
        joints = {f"joint_{i}.pos": float(value) for i, value in enumerate(self.positions)}
        return {**joints, "front": ramp.copy(), "wrist": ramp[:, ::-1].copy()}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        values = [float(action[f"joint_{i}.pos"]) for i in range(ACTIONS)]
        self.positions[:ACTIONS] = values
        if self.config.log:
            with Path(self.config.log).open("a") as file:
                file.write(" ".join(f"{value:.6f}" for value in values) + "\n")
        return action

    def disconnect(self) -> None:
        self.connected = False
