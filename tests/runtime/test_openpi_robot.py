"""Environments of openpi-client's form as robots. The real package: tests/integrations/test_openpi_client.py."""

import sys

import numpy as np
import pytest

from ki_edge.errors import RobotError
from ki_edge.policy import contract as contracts
from ki_runtime import ControlLoop, LoopOptions
from ki_runtime.robots import open_robot

CODE = '''
import numpy as np
class Cell:
    """ALOHA's form: pictures with the colours first."""
    def __init__(self, steps=7):
        self.most, self.applied, self.resets, self.closed = steps, [], 0, 0
    def reset(self):
        self.resets += 1; self.applied = []
    def is_episode_complete(self):
        return len(self.applied) >= self.most
    def get_observation(self):
        top = np.full((3, 4, 6), len(self.applied), np.uint8)
        return {"state": np.zeros(2), "images": {"top": top}, "prompt": "tidy up"}
    def apply_action(self, action):
        self.applied.append(action)
    def close(self):
        self.closed += 1
class Half:
    def reset(self): pass
class Lists(Cell):
    def get_observation(self): return [1]
'''
CONTRACT = contracts.generic(["top"], state_dim=2, action_dim=2, action_horizon=4, execute=2, control_hz=200.0)


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cells_of_openpi.py").write_text(CODE)
    (tmp_path / "needs_client.py").write_text("from openpi_client.runtime import environment\n")
    yield
    sys.modules.pop("cells_of_openpi", None)
    sys.path[:] = [place for place in sys.path if place != str(tmp_path)]


class Rows:
    contract = CONTRACT

    def infer(self, observation, **options):
        assert observation["images"]["top"].shape == (3, 4, 6) and observation["prompt"] == "tidy up"
        return {"actions": np.arange(8.0).reshape(4, 2)}


def test_a_loop_drives_an_environment():
    robot = open_robot("openpi:cells_of_openpi:Cell", config={"steps": 5})
    cell = robot._environment
    report = ControlLoop(Rows(), robot, LoopOptions(episodes=2)).run()
    assert [episode.steps for episode in report.episodes] == [5, 5] and cell.resets == 2 and cell.closed == 1
    assert [action["actions"].tolist() for action in cell.applied] == [[0, 1], [2, 3], [0, 1], [2, 3], [0, 1]]
    assert cell.applied[0]["actions"].dtype == np.float32
    assert robot.frame().shape == (4, 6, 3) and report.episodes[0].success is None


def test_the_rate_comes_from_the_policy_or_the_loop():
    class Unknown(Rows):
        contract = contracts.generic(["top"], state_dim=2, action_dim=2, action_horizon=4)

    robot = open_robot("openpi:cells_of_openpi:Cell")
    with pytest.raises(RobotError, match="says how many actions a second there are: give the rate"):
        ControlLoop(Unknown(), robot)
    ControlLoop(Unknown(), robot, LoopOptions(rate=50.0))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            "cells_of_openpi:Half",
            "Half is no openpi environment, it has no is_episode_complete, get_observation, apply",
        ),
        ("cells_of_openpi:Cel", r"has no Cel; it has Cell, Half, Lists"),
        ("cells_of_openpi", "does not name a class"),
        (
            "needs_client:Cell",
            "needs openpi_client, which is not installed .*: openpi-client 0.1.2 asks for numpy below",
        ),
    ],
)
def test_what_is_no_environment(spec, words):
    with pytest.raises(RobotError, match=words):
        open_robot(f"openpi:{spec}")


def test_an_observation_that_is_no_dict():
    with pytest.raises(RobotError, match="get_observation gave list, expected a dict"):
        open_robot("openpi:cells_of_openpi:Lists").observe()
