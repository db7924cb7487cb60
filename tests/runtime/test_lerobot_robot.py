"""A LeRobot robot's flat keys as a policy's state, cameras and action. The real LeRobot: tests/integrations."""

import importlib.util
import math

import numpy as np
import pytest

from ki_edge.errors import RobotError
from ki_edge.policy import contract as contracts
from ki_runtime.robots import EpisodeStatus, open_robot
from ki_runtime.robots.lerobot_mapping import read_mapping
from ki_runtime.robots.lerobot_robot import LerobotRobot
from ki_runtime.robots.protocol import check_robot

SEEN = {"a.pos": float, "b.pos": float, "wrist": (4, 6, 3), "top": (4, 6, 3)}
TAKEN = {"a.pos": float, "b.pos": float, "base.vel": float}
FIXED = {"fixed": {"base.vel": 0.5}}
CONTRACT = contracts.generic(["top"], state_dim=2, action_dim=2, action_horizon=4)


class Device:
    """What LeRobot's interface promises: `sends` is what it makes of a command."""

    observation_features, action_features = SEEN, TAKEN

    def __init__(self):
        self.sent, self.is_connected, self.fails = [], True, False
        self.seen = {
            "a.pos": 1.0,
            "b.pos": np.float32(2),
            "wrist": np.zeros((4, 6, 3), np.uint8),
            "top": np.ones((4, 6, 3), np.uint8),
        }

    def get_observation(self):
        if self.fails:
            raise TimeoutError("camera top\nis gone")
        return dict(self.seen)

    def send_action(self, command):
        self.sent.append(command)
        return {**command, "a.pos": min(command["a.pos"], 5.0)}

    def disconnect(self):
        self.is_connected = False


def robot(**config):
    device = Device()
    return LerobotRobot(device, read_mapping({**FIXED, **config}, SEEN, TAKEN, "arm"), "arm"), device


def test_by_itself_all_numbers_in_lerobots_order():
    arm, device = robot(prompt="fold", max_steps=2)
    check_robot(arm)
    assert arm.action_names == ("a.pos", "b.pos") and arm.control_hz is None
    observation = arm.observe()
    assert observation["state"].tolist() == [1, 2] and sorted(observation["images"]) == ["top", "wrist"]
    assert observation["prompt"] == "fold"
    arm.fit(CONTRACT)
    assert sorted(arm.observe()["images"]) == ["top"]
    arm.act(np.array([3, 4], np.float32))
    assert device.sent == [{"a.pos": 3.0, "b.pos": 4.0, "base.vel": 0.5}]
    assert arm.status() == EpisodeStatus(False, None, 1)
    arm.act(np.array([3, 4], np.float32))
    assert arm.status().done and arm.frame().shape == (4, 6, 3)


def test_names_and_orders_of_the_policy():
    arm, device = robot(
        state=["b.pos"], actions={"second": "b.pos", "first": "a.pos"}, cameras={"front": "wrist"}, film="front"
    )
    assert arm.action_names == ("second", "first")
    observation = arm.observe()
    assert observation["state"].tolist() == [2.0] and list(observation["images"]) == ["front"]
    arm.act(np.array([3, 4], np.float32))
    assert device.sent[-1] == {"b.pos": 3.0, "a.pos": 4.0, "base.vel": 0.5}


def test_what_was_really_sent_is_kept_and_told_once(capsys):
    arm, _ = robot()
    arm.act(np.array([9, 4], np.float32))
    arm.act(np.array([9, 4], np.float32))
    assert arm.sent.tolist() == [5, 4]
    assert capsys.readouterr().err == (
        "arm sent a.pos 5 instead of 9, as its own limits say (max_relative_target); further ones are not told\n"
    )


def test_holding_and_coming_to_rest():
    arm, device = robot()
    arm.hold()
    arm.safe_stop()
    assert device.sent == []  # nothing was commanded yet, so it stands as people left it
    arm.act(np.array([3, 4], np.float32))
    arm.hold()
    assert device.sent[-1] == {"a.pos": 3.0, "b.pos": 4.0, "base.vel": 0.0}
    arm.safe_stop()
    assert device.sent[-1] == {"a.pos": 1.0, "b.pos": 2.0, "base.vel": 0.0}  # where the joints are
    assert device.sent[-2] == {"a.pos": 3.0, "b.pos": 4.0, "base.vel": 0.0}  # no velocity waits for the cameras
    device.fails = True
    arm.safe_stop()
    assert device.sent[-1] == {"a.pos": 1.0, "b.pos": 2.0, "base.vel": 0.0}  # as it was sent last
    arm.close()
    arm.close()
    assert not device.is_connected
    with pytest.raises(RobotError, match="arm is closed"):
        arm.act(np.array([3, 4], np.float32))


def test_joints_that_are_not_observed_keep_their_command():
    arm, device = robot()
    arm.act(np.array([3, 4], np.float32))
    device.seen["a.pos"] = math.nan
    del device.seen["b.pos"]
    arm.safe_stop()
    assert device.sent[-1] == {"a.pos": 3.0, "b.pos": 4.0, "base.vel": 0.0}


def test_faults_of_the_device_are_one_line():
    arm, device = robot()
    device.fails = True
    with pytest.raises(RobotError, match=r"^arm: get_observation failed: TimeoutError: camera top is gone$"):
        arm.observe()
    device.fails = False
    del device.seen["top"]
    with pytest.raises(RobotError, match=r"the observation has no top; it has a\.pos, b\.pos, wrist"):
        arm.observe()
    with pytest.raises(RobotError, match="not finite"):
        arm.act(np.array([3, np.nan], np.float32))
    assert device.sent == []


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"state": ["c.pos"]}, "state: there is no c.pos; arm observes a.pos, b.pos"),
        ({"state": ["top"]}, "state: there is no top"),
        ({"state": ["a.pos", "a.pos"]}, "state has 'a.pos' twice"),
        ({"actions": ["a.pos"]}, "nothing commands b.pos of arm: name it in actions, or give its value in fixed"),
        ({"actions": ["a.pos", "b.pos", "c"]}, "actions: there is no c; arm takes a.pos, b.pos, base.vel"),
        ({"actions": {"x": "a.pos", "y": "a.pos"}}, "actions has 'a.pos' twice"),
        ({"actions": ["a.pos", "b.pos", "base.vel"]}, "base.vel is both in actions and in fixed"),
        ({"actions": {"x": 3}}, "actions: x is 3, expected text"),
        ({"fixed": {"base.vel": "fast"}}, "fixed: base.vel is 'fast', expected a number"),
        ({"fixed": {"wheel": 1}}, "fixed: there is no wheel"),
        ({"cameras": {"front": "side"}}, "cameras: there is no side; arm has the cameras wrist, top"),
        ({"film": "front"}, "film: there is no front; there are the cameras wrist, top"),
        ({"max_steps": 0}, "max_steps is 0, expected an integer from 1"),
        ({"states": []}, "unknown key states; there is robot, state, actions"),
    ],
)
def test_a_mapping_that_does_not_fit_the_robot(config, words):
    with pytest.raises(RobotError) as error:
        read_mapping({**FIXED, **config}, SEEN, TAKEN, "arm")
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("contract", "words"),
    [
        (
            contracts.generic(["side"], state_dim=2, action_dim=2, action_horizon=4),
            "has no camera side: it has wrist, top",
        ),
        (contracts.generic(["top"], state_dim=3, action_dim=2, action_horizon=4), "has 2 numbers in its state"),
        (contracts.generic(["top"], state_dim=2, action_dim=3, action_horizon=4), "has 2 numbers in its action"),
    ],
)
def test_a_contract_that_does_not_fit(contract, words):
    arm, device = robot()
    with pytest.raises(RobotError, match=words):
        arm.fit(contract)
    assert device.sent == []


@pytest.mark.skipif(importlib.util.find_spec("lerobot") is not None, reason="LeRobot is installed here")
def test_without_lerobot_one_line_says_what_to_do():
    with pytest.raises(
        RobotError, match=r"LeRobot is not installed in this Python .*install the ki-edge wheel with \[o"
    ):
        open_robot("lerobot:so101_follower", config={})
