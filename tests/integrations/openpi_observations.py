"""Observations of openpi's three robots, as its examples send them; numpy alone, so that both sides make the same."""

import numpy as np

ROBOTS = ("droid", "libero", "aloha")
WIDTH = {"droid": 8, "libero": 7, "aloha": 14}  # numbers of an action
HORIZON = 10


def picture(start: int) -> np.ndarray:
    """uint8 [224, 224, 3]."""
    return ((np.arange(224 * 224 * 3) * 7 // 5 + start) % 256).astype(np.uint8).reshape(224, 224, 3)


def observation(robot: str, number: int = 0) -> dict:
    """The `number`-th of a robot."""
    if robot == "droid":
        return {
            "observation/exterior_image_1_left": picture(number),
            "observation/wrist_image_left": picture(number + 1),
            "observation/joint_position": np.linspace(-1, 1, 7) * (1 + 0.01 * number),
            "observation/gripper_position": np.array([0.25]),
            "prompt": "put the marker into the cup",
        }
    if robot == "libero":
        return {
            "observation/image": np.ascontiguousarray(picture(number)[::-1, ::-1]),
            "observation/wrist_image": picture(number + 2),
            "observation/state": np.linspace(-0.5, 0.5, 8, dtype=np.float32) * (1 + 0.01 * number),
            "prompt": "open the drawer",
        }
    cameras = ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")
    return {
        "state": np.linspace(-0.3, 0.3, 14) * (1 + 0.01 * number),
        "images": {name: picture(number + place).transpose(2, 0, 1) for place, name in enumerate(cameras)},
        "prompt": "uncap the pen",
    }
