"""The parts of examples/ros2 that need no ROS: joints by name, pictures, and the loop over messages that tests make."""

import io
import json
import runpy
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ki_edge.errors import RobotError
from ki_runtime import ControlLoop, LoopOptions, Policy
from ki_runtime.robots.protocol import check_robot

FOLDER = Path(__file__).parents[1] / "examples" / "ros2"
PICTURE = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


@pytest.fixture(scope="module")
def ros():
    return SimpleNamespace(**runpy.run_path(str(FOLDER / "ros_arm.py")))


def image(picture, encoding="rgb8", pad=0):
    rows = np.pad(picture.reshape(len(picture), -1), [(0, 0), (0, pad)])
    return SimpleNamespace(
        encoding=encoding, height=len(picture), width=picture.shape[1], step=rows.shape[1], data=rows.tobytes()
    )


def test_joints_are_found_by_name_whatever_their_order(ros):
    found = ros.joints_by_name(["c", "a", "other", "b"], [3.0, 1.0, 9.0, 2.0], ["a", "b", "c"])
    assert found.tolist() == [1, 2, 3] and found.dtype == np.float32
    with pytest.raises(RobotError, match="has no d; it has a, b"):
        ros.joints_by_name(["a", "b"], [1, 2], ["a", "d"])
    with pytest.raises(RobotError, match="names 2 joints and has 1 positions"):
        ros.joints_by_name(["a", "b"], [1], ["a"])


def test_pictures_of_every_kind(ros):
    np.testing.assert_array_equal(ros.picture_of(image(PICTURE)), PICTURE)
    np.testing.assert_array_equal(ros.picture_of(image(PICTURE, pad=1)), PICTURE)  # rows may be padded
    np.testing.assert_array_equal(ros.picture_of(image(PICTURE[..., ::-1], "bgr8")), PICTURE)
    file = io.BytesIO()
    Image.fromarray(PICTURE).save(file, "png")
    np.testing.assert_array_equal(ros.picture_of(SimpleNamespace(format="png", data=file.getvalue())), PICTURE)
    with pytest.raises(RobotError, match="encoding mono8, expected rgb8 or bgr8"):
        ros.picture_of(image(PICTURE, "mono8"))


def test_the_loop_drives_it_over_messages(ros, fetch_bundle):
    config = {**json.loads((FOLDER / "arm.json").read_text()), "max_steps": 8}
    config["command"]["joints"] = ["x", "y", "z", "gripper"]  # as the shipped policy calls them
    latest, sent = ros.Latest(), []
    names = [*config["state"]["joints"], *config["command"]["joints"]]
    position = dict.fromkeys(names, 0.5) | dict(zip(config["state"]["joints"], [1.34, 0.75, 0.53, 0, 0], strict=True))

    def spin():
        """What the executor's thread does."""
        count = 0
        while not over.wait(0.01):
            count += 1
            state = SimpleNamespace(name=list(position), position=list(position.values()))
            latest.keep("state")(state)
            for name in config["cameras"]:
                latest.keep(name)(image(np.full((96, 96, 3), count % 200, np.uint8)))

    over = threading.Event()
    spinning = threading.Thread(target=spin)
    arm = ros.RosArm(config, latest, lambda positions: sent.append(positions.tolist()))
    check_robot(arm)
    spinning.start()
    try:
        report = ControlLoop(Policy.load(fetch_bundle), arm, LoopOptions(mode="async", stale_after=5.0)).run()
    finally:
        over.set()
        spinning.join()
    assert report.episodes[0].steps == 8 and len(sent) == 9
    assert sent[-1] == [0.5] * 4  # where the joints are: at rest


def test_what_never_comes_is_named(ros, monkeypatch):
    config = json.loads((FOLDER / "arm.json").read_text())
    latest = ros.Latest()
    latest.keep("state")(SimpleNamespace(name=[], position=[]))
    monkeypatch.setitem(ros.RosArm.reset.__globals__, "FIRST", 0.1)
    with pytest.raises(RobotError, match="no message of front_left, front_right within"):
        ros.RosArm(config, latest, None).reset()
