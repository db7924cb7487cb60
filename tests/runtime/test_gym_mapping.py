"""Gymnasium environments that a mapping describes: Fetch's with the real simulator, and small ones of every kind."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ki_edge.errors import RobotError
from ki_edge.policy import contract as contracts
from ki_runtime import ControlLoop, LoopOptions, Policy
from ki_runtime.robots import EpisodeStatus, open_robot

if importlib.util.find_spec("gymnasium_robotics") is None:  # not imported here: MUJOCO_GL must be set before
    pytest.skip("needs ki-edge[sim]", allow_module_level=True)

MAPPINGS = Path(__file__).parents[2] / "runtime" / "ki_runtime" / "robots" / "mappings"
# An environment of somebody else, in a module that registers it.
MODULE = '''
import gymnasium, numpy as np
from gymnasium import spaces

class Slider(gymnasium.Env):
    """x moves by the action; there when it is 1 or more."""
    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    def __init__(self, kind="box", render_mode=None):
        self.render_mode = render_mode
        spaces_ = {"box": spaces.Box(-0.5, 0.5, (2,), np.float32), "whole": spaces.Box(0, 3, (2,), np.int64),
                   "keys": spaces.Discrete(3, start=1), "nested": spaces.Dict({"a": spaces.Discrete(2)})}
        self.action_space = spaces_[kind]
        picture = spaces.Box(0, 255, (8, 6, 3), np.uint8)
        own = spaces.Dict({"joints": spaces.Box(-9, 9, (3,)), "x": spaces.Box(-9, 9, ())})
        self.observation_space = spaces.Dict({"pixels": spaces.Dict({"top": picture}), "agent": own})
        self.taken = []
    def _observation(self):
        top = np.full((8, 6, 3), min(255, 10 * len(self.taken)), np.uint8)
        own = {"joints": np.array([1.0, 2.0, 3.0]), "x": np.float32(self.x)}
        return {"pixels": {"top": top}, "agent": own}
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.taken = float(self.np_random.integers(3)) / 10, []
        return self._observation(), {}
    def step(self, action):
        self.taken.append(action)
        self.x += float(np.ravel(action)[0])
        return self._observation(), self.x, self.x >= 1, False, {"there": self.x >= 1, "raw": np.array(action)}
    def render(self):
        return np.full((4, 4, 3), 7, np.uint8)

gymnasium.register("Slider-v0", Slider, max_episode_steps=4)
'''
SLIDER = {
    "prompt": "slide",
    "state": [{"key": "agent/x"}, {"key": "agent/joints", "indices": [2, 0]}],
    "cameras": {"top": {"key": "pixels/top"}, "side": {"render": True}},
    "actions": {"names": ["x", "y"]},
    "success": {"info": "there"},
}
CONTRACT = contracts.generic(["top"], state_dim=3, action_dim=2, action_horizon=4, model_action_dim=4)


@pytest.fixture(scope="module")
def sliders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sliders")
    (folder / "sliders.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    yield "gym:sliders:Slider-v0"
    sys.path.remove(str(folder))
    sys.modules.pop("sliders", None)


def opened(spec, **changes):
    return open_robot(spec, config={**SLIDER, **changes})


def test_an_environment_as_its_mapping_says(sliders):
    robot = opened(sliders)
    robot.reset(1)
    observation = robot.observe()
    assert sorted(observation["images"]) == ["side", "top"] and observation["prompt"] == "slide"
    assert observation["images"]["side"].tolist() == np.full((4, 4, 3), 7).tolist()
    np.testing.assert_allclose(observation["state"][1:], [3.0, 1.0])  # the joints' numbers 2 and 0
    assert robot.control_hz == 20 and robot.status() == EpisodeStatus(False, False, 0)
    robot.fit(CONTRACT)
    assert sorted(robot.observe()["images"]) == ["top"]  # what the policy does not look at is not drawn
    start = robot.measure()[0]
    robot.act(np.array([0.25, 9.0], np.float32))
    np.testing.assert_allclose(robot.measure()[0], start + 0.25)
    assert robot._env.unwrapped.taken[-1].tolist() == [0.25, 0.5]  # within the bounds of its space
    for _ in range(2):
        robot.act(np.array([0.5, 0], np.float32))
    assert robot.status() == EpisodeStatus(True, True, 3)
    assert robot.frame().shape == (8, 6, 3)
    robot.close()
    robot.close()


def test_the_same_seed_starts_the_same_episode(sliders):
    robot, fixed = opened(sliders), opened(sliders, seed=3)
    starts = []
    for seed in (0, 1, 2, 3, 0):
        robot.reset(seed)
        fixed.reset(seed)
        starts.append((float(robot.measure()[0]), float(fixed.measure()[0])))
    assert starts[0][0] == starts[4][0] and len({own for own, _ in starts}) > 1
    assert {always for _, always in starts} == {starts[3][0]}


def test_actions_are_scaled_and_relative(sliders):
    actions = {"names": ["x", "y"], "scale": [2, 1], "offset": [0, 0.1], "relative_to": {"key": "agent/x"}}
    robot = opened(sliders, actions=actions)
    robot.reset(1)
    start = float(robot.measure()[0])
    robot.act(np.array([start + 0.1, 0.2], np.float32))
    np.testing.assert_allclose(robot._env.unwrapped.taken[-1], [0.2, 0.3], atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "names", "action", "taken"),
    [("whole", ["x", "y"], [1.6, 9], [2, 3]), ("keys", ["key"], [2.4], 2), ("keys", ["key"], [-7], 1)],
)
def test_spaces_of_whole_numbers(sliders, kind, names, action, taken):
    robot = opened(sliders, make={"kind": kind}, actions={"names": names})
    robot.act(np.array(action, np.float32))
    assert np.array_equal(robot._env.unwrapped.taken[-1], taken)


@pytest.mark.parametrize(("success", "expected"), [({"terminated": True}, [False, False, True]), (None, [None] * 3)])
def test_how_success_is_known(sliders, success, expected):
    robot = opened(sliders, success=success)
    robot.reset(0)
    found = []
    for _ in range(3):
        robot.act(np.array([0.45 if found else 0.05, 0], np.float32))
        found.append(robot.status().success)
    assert found in (expected, [expected[0], True, True])  # a start further on is there earlier


def test_the_rewards_threshold_and_the_number_of_steps(sliders):
    robot = opened(sliders, success={"reward": 0.4}, max_steps=2)
    robot.reset(0)
    robot.act(np.array([-0.5, 0], np.float32))
    assert robot.status() == EpisodeStatus(False, False, 1)
    for _ in range(1):
        robot.act(np.array([0.5, 0], np.float32))
    assert robot.status().done and robot.status().steps == 2


BAD = [
    ({"state": None}, "state is missing"),
    ({"state": []}, r"state: expected a list such as \[\{\"key\""),
    ({"state": [{"key": "agent/y"}]}, "has no 'agent/y'; it has pixels/top [8, 6, 3], agent/joints [3], agent/x []"),
    ({"state": [{"key": "agent/joints", "indices": [3]}]}, "has 3 numbers, and the mapping wants number 3"),
    ({"state": [{"key": "agent"}]}, "agent"),
    ({"cameras": {"top": {"key": "agent/joints"}}}, "is float64 [3], expected a picture uint8"),
    ({"cameras": {"top": {}}}, "cameras: top: expected one of key, render, mujoco"),
    ({"cameras": {"top": {"key": "a", "render": True}}}, "expected one of key, render, mujoco"),
    ({"cameras": {"top": {"mujoco": {"camera": "a"}}}}, "size is missing"),
    ({"cameras": {"top": {"mujoco": {"camera": "a"}, "size": [0, 9]}}}, "size is [0, 9], expected [height, width]"),
    ({"cameras": {"top": {"mujoco": {"camera": "a"}, "size": [9, 9]}}}, "is no MuJoCo environment"),
    ({"cameras": {"top": {"mujoco": {"azimuth": 1}, "size": [9, 9]}}}, "look_at is missing"),
    ({"actions": {"names": ["x"]}}, "takes 2 numbers as an action (Box(-0.5, 0.5, (2,), float32)), and the mapping"),
    ({"actions": {"names": ["x", "x"]}}, "names has 'x' twice"),
    ({"actions": {"names": ["x", "y"], "scale": [1]}}, "scale is [1], expected a list of 2 numbers"),
    ({"actions": {"names": ["x", "y"], "relative_to": {"key": "", "indices": [0, 1, 2]}}}, "more indices than"),
    ({"make": {"kind": "nested"}}, "expected a Box of one axis or a Discrete space"),
    ({"make": {"kinds": 1}}, "cannot be made"),
    ({"success": {}}, "success: expected one of info, terminated, reward"),
    ({"control_hz": 0}, "control_hz is 0, expected a number from 0.001 to 10000"),
    ({"max_steps": True}, "max_steps is True, expected an integer"),
    ({"camera": {}}, "unknown key camera; there is prompt, control_hz"),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=[words[:30] for _, words in BAD])
def test_a_wrong_mapping_is_refused_when_it_is_opened(sliders, changes, words):
    with pytest.raises(RobotError) as error:
        opened(sliders, **changes)
    assert words.replace("\\", "") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("contract", "words"),
    [
        (contracts.generic(["wrist"], state_dim=3, action_dim=2, action_horizon=4),
         "has no camera wrist: it has top, side, and the policy needs wrist"),
        (contracts.generic(["top"], state_dim=4, action_dim=2, action_horizon=4),
         "has 3 numbers in its state, and the policy's contract has 4"),
        (contracts.generic(["top"], state_dim=3, action_dim=3, action_horizon=4),
         "has 2 numbers in its action, and the policy's contract has 3"),
    ],
)  # fmt: skip
def test_what_the_contract_needs_is_checked_before_anything_moves(sliders, contract, words):
    class Actor:
        def infer(self, observation, **options):
            raise AssertionError

    Actor.contract = contract
    robot = opened(sliders)
    with pytest.raises(RobotError, match=words):
        ControlLoop(Actor(), robot)
    assert robot._env.unwrapped.taken == []


@pytest.mark.parametrize(
    "contract",
    [
        contracts.libero(action_horizon=4, normalization="none"),
        contracts.droid(action_horizon=4, normalization="none"),
        contracts.aloha(action_horizon=4, normalization="none"),
    ],
    ids=["libero", "droid", "aloha"],
)
def test_observations_come_in_the_form_of_the_contract(sliders, contract):
    from ki_edge.policy.transforms import read_images, read_state

    names = [key.split("/")[-1] for camera in contract.cameras if (key := camera.key)]
    state = [{"key": "agent/joints", "indices": [at % 3 for at in range(contract.state_dim)]}]
    cameras = {name: {"key": "pixels/top"} for name in names}
    robot = opened(sliders, state=state, cameras=cameras)
    robot._form.fit(contract, "robot", contract.state_dim, contract.action_dim)
    observation = robot.observe()
    np.testing.assert_array_equal(read_state(contract, observation), robot.measure())
    assert read_images(contract, observation)[1].sum() == len(names)


def test_unknown_environments_and_those_without_a_mapping():
    with pytest.raises(RobotError, match=r"there is no environment 'FetchPsh-v4'.*most alike: .*FetchPush"):
        open_robot("gym:FetchPsh-v4", config=SLIDER)
    with pytest.raises(RobotError, match=r"needs --robot-config FILE.*FetchReach-v4, FetchPickAndPlace-v4, FetchPush"):
        open_robot("gym:CartPole-v1")
    with pytest.raises(RobotError, match=r"made as EnvironmentRobot.* unexpected keyword argument 'disturb'$") as error:
        open_robot("gym:FetchPush-v4", disturb=3)  # whose target does not move
    assert len(str(error.value)) < 500
    with pytest.raises(RobotError, match="there is no module no_such_module"):
        open_robot("gym:no_such_module:Slider-v0", config=SLIDER)


@pytest.mark.parametrize("name", ["FetchPush-v4", "FetchPickAndPlace-v4"])
def test_fetch_tasks_come_with_their_mapping(fetch_bundle: Path, name):
    """The shipped policy fits them: the same arm and cameras. It was not trained for the task."""
    robot = open_robot(f"gym:{name}")
    robot.reset(3)
    picture = robot.observe()["images"]["front_left"]
    assert picture.shape == (96, 96, 3) and picture.std() > 10
    grip = robot.measure()[:3]
    report = ControlLoop(Policy.load(fetch_bundle), robot, LoopOptions(max_steps=10, close_robot=False)).run()
    assert report.episodes[0].steps == 10 and report.episodes[0].success in (False, True)
    assert np.linalg.norm(robot.measure()[:3] - grip) > 0.01
    target = robot.measure()[:3] + np.array([0.0, 0.04, 0.05])
    for _ in range(20):
        robot.act(np.append(target, 0).astype(np.float32))
    np.testing.assert_allclose(robot.measure()[:3], target, atol=0.01)  # an action is where the gripper shall be
    assert robot.frame().shape == (320, 320, 3)
    robot.close()


def test_reach_by_a_mapping_is_the_robot_that_is_shipped():
    """State, pictures and motion of `gym:FetchReach-v4` itself and of the same environment by a mapping."""
    mapping = json.loads((MAPPINGS / "FetchPush-v4.json").read_text())
    mapping["state"][0]["indices"] = [0, 1, 2, 4, 3]
    own, mapped = open_robot("gym:FetchReach-v4"), open_robot("gym:FetchReach-v4", config=mapping)
    own.reset(7)
    mapped.reset(7)
    for step in range(5):
        left, right = own.observe(), mapped.observe()
        np.testing.assert_array_equal(left["state"], right["state"])
        for camera, picture in left["images"].items():
            np.testing.assert_array_equal(picture, right["images"][camera], f"{camera}, step {step}")
        action = np.array([1.4, 0.7, 0.6, 0.0], np.float32)
        own.act(action)
        mapped.act(action)
    own.close()
    mapped.close()


def test_ki_run_with_a_mapping_file(fetch_bundle: Path, tmp_path: Path):
    mapping = json.loads((MAPPINGS / "FetchPush-v4.json").read_text())
    del mapping["cameras"]["front_right"]
    (tmp_path / "push.json").write_text(json.dumps(mapping))
    command = [sys.executable, "-m", "ki_runtime.control.cli", str(fetch_bundle), "--robot", "gym:FetchPush-v4"]
    command += ["--robot-config", str(tmp_path / "push.json")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.splitlines()[-1] == (
        "ki-run: error: gym:FetchPush-v4 has no camera front_right: it has front_left, and the policy needs "
        "front_left, front_right; name them so in its configuration (--robot-config FILE)"
    )
