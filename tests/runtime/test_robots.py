"""The robots, with the real simulator: pictures, the expert, demonstrations, replay, and what is refused."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ki_edge.recordings.collection import open_recordings
from ki_runtime.robots import EpisodeStatus, RobotError, open_robot
from ki_runtime.robots.fetch import CAMERAS, PLAN_STEP, FetchScene

if importlib.util.find_spec("gymnasium_robotics") is None:  # not imported here: MUJOCO_GL must be set before
    pytest.skip("needs ki-edge[sim]", allow_module_level=True)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scene():
    scene = FetchScene()
    yield scene
    scene.close()


@pytest.fixture(scope="module")
def demonstrations():
    spec = importlib.util.spec_from_file_location("demonstrations", ROOT / "examples/fetch/demonstrations.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["demonstrations"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["demonstrations"]


# --- pictures ---------------------------------------------------------------------------------------------------------


def is_red(picture):
    return (picture[..., 0] > 90) & (picture[..., 1] < 60) & (picture[..., 2] < 60)


@pytest.mark.parametrize("offset", [(0.1, -0.12, 0.05), (0.1, 0.13, 0.1), (0.14, 0.0, -0.1), (0.05, -0.1, 0.14)])
def test_projected_target_is_where_the_red_ball_is(scene, offset):
    scene.reset(0)
    scene.move_target(scene.home + np.array(offset))
    pictures, points = scene.pictures(), scene.target_points()
    for camera, (x, y) in zip(CAMERAS, points, strict=True):
        rows, columns = np.nonzero(is_red(pictures[camera.name]))
        near = np.hypot(columns + 0.5 - x * 96, rows + 0.5 - y * 96) < 5  # pixels
        assert near.sum() >= 6, camera.name
        centre = np.array([columns[near].mean(), rows[near].mean()]) + 0.5
        assert np.abs(centre - [x * 96, y * 96]).max() < 0.75, camera.name


def test_points_outside_the_picture_are_nan():
    camera = CAMERAS[0]
    assert np.allclose(camera.project(np.array(camera.look_at)), 0.5)
    assert np.isnan(camera.project(np.array(camera.look_at) + np.array([0.0, 0.0, 2.0]))).all()
    assert np.isnan(camera.project(np.array([3.0, -0.5, 1.5]))).all()  # behind the camera


def test_same_seed_gives_the_same_pictures_whatever_happened_before(scene):
    scene.reset(7)
    first = scene.pictures(), scene.state, scene.target
    scene.step(np.array([1, -1, 0.5, 0], np.float32))
    scene.film_frame()
    scene.reset(8)
    other = scene.pictures()
    scene.reset(7)
    again = scene.pictures(), scene.state, scene.target
    for name, picture in first[0].items():
        assert picture.shape == (96, 96, 3) and picture.dtype == np.uint8
        assert np.array_equal(picture, again[0][name])
        assert not np.array_equal(picture, other[name])
    assert np.array_equal(first[1], again[1]) and np.array_equal(first[2], again[2])


# --- the robot --------------------------------------------------------------------------------------------------------


def test_state_is_proprioception(scene):
    scene.reset(1)
    before = scene.state
    scene.move_target(scene.home + 0.1)
    assert before.dtype == np.float32 and before.shape == (5,)
    assert np.array_equal(scene.state, before)  # the target is not in it
    assert np.allclose(before[:3], scene.home, atol=1e-3)
    up = scene.gripper + np.array([0.0, 0.0, 0.1])
    scene.step(np.append(up, 0.0))
    assert scene.state[2] > before[2] + 0.005


@pytest.mark.parametrize("seed", range(6))
def test_expert_reaches_the_target(scene, seed):
    scene.reset(seed)
    assert not scene.success or scene.distance < 0.05
    for _ in range(scene.step_limit):
        scene.step(scene.plan(1)[0])
    assert scene.success
    assert scene.distance < 0.025


def test_gym_robot_runs_an_episode():
    robot = open_robot("gym:FetchReach-v4", prompt="touch it")
    try:
        robot.reset(3)
        observation = robot.observe()
        assert sorted(observation) == ["images", "prompt", "state"]
        assert sorted(observation["images"]) == ["front_left", "front_right"]
        assert observation["prompt"] == "touch it"
        assert robot.control_hz == 25.0
        assert robot.frame().shape == (320, 320, 3)
        assert robot.status() == EpisodeStatus(done=False, success=False, steps=0)
        for step in range(50):
            assert not robot.status().done, step
            robot.act(robot._scene.plan(1)[0])
        assert robot.status() == EpisodeStatus(done=True, success=True, steps=50)
        robot.reset(3)
        assert robot.status() == EpisodeStatus(done=False, success=False, steps=0)
        assert np.array_equal(robot.observe()["images"]["front_left"], observation["images"]["front_left"])
    finally:
        robot.close()


def test_plan_goes_straight_to_the_target_and_stays(scene):
    scene.reset(1)
    start, target = scene.gripper, scene.target
    plan = scene.plan(8)
    assert plan.shape == (8, 4) and plan.dtype == np.float32
    assert np.all(np.abs(np.diff(np.vstack([start, plan[:, :3]]), axis=0)) <= PLAN_STEP + 1e-6)
    assert np.allclose(plan[-1], [*target, 0.0], atol=1e-6)


def test_far_setpoints_are_bounded_and_bad_ones_refused():
    robot = open_robot("gym:FetchReach-v4")
    try:
        robot.reset(0)
        robot.act(np.array([1.34, 9, 0.53, 0], np.float32))
        far = robot.observe()["state"]
        robot.reset(0)
        robot.act(np.array([1.34, 2, 0.53, 0], np.float32))
        assert np.array_equal(robot.observe()["state"], far)
        for action, words in [([0, np.nan, 0, 0], "not finite"), ([0, 0, 0], r"shape \(3,\), expected \(4,\)")]:
            with pytest.raises(RobotError, match=words):
                robot.act(np.array(action, np.float32))
        assert robot.status().steps == 1
    finally:
        robot.close()


def run_python(code, **variables):
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "variables",
    [
        {"MUJOCO_GL": "nonsense"},
        {"MUJOCO_GL": "off"},
        {"MUJOCO_GL": "egl", "__EGL_VENDOR_LIBRARY_DIRS": "/nonexistent"},
    ],
    ids=["unknown library", "rendering switched off", "EGL without a driver"],
)
def test_missing_gl_is_said_in_one_line(variables):
    result = run_python(
        "from ki_runtime.robots import open_robot, RobotError\n"
        "try: open_robot('gym:FetchReach-v4')\n"
        "except RobotError as error: print(error)",
        **variables,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    assert f"MUJOCO_GL={variables['MUJOCO_GL']!r}" in result.stdout
    assert "apt install libegl1 libgl1-mesa-dri" in result.stdout
    assert result.stderr == ""


def test_package_needs_numpy_only():
    result = run_python(
        "import sys; import ki_runtime.robots, ki_runtime.robots.fetch, ki_runtime.robots.replay\n"
        "print([m for m in ('mujoco', 'gymnasium', 'torch', 'onnxruntime') if m in sys.modules])"
    )
    assert result.stdout == "[]\n", result.stderr


# --- demonstrations ---------------------------------------------------------------------------------------------------


def test_demonstrations_are_a_dataset_and_a_text_set(demonstrations, tmp_path, monkeypatch, capsys):
    pytest.importorskip("pyarrow", reason="pip install 'ki-edge[record]'")
    monkeypatch.setattr(demonstrations, "SHARD", 2)
    out, points = tmp_path / "out", tmp_path / "points"
    arguments = [str(out), "--points", str(points), "--scenes", "3", "--frames", "4", "--seed", "5", "--workers", "1"]
    demonstrations.main(arguments)
    settings = demonstrations.Settings(3, 5, 4)
    scenes = [scene for index in settings.shards() for scene in demonstrations.film_shard(settings, index)]
    recordings = open_recordings(out)
    assert (len(recordings), recordings.fps, recordings.action_names) == (3, 25, ["x", "y", "z", "gripper"])
    for number, scene in enumerate(scenes):
        episode = recordings.episode(number)
        assert episode.prompt == scene.prompt and len(episode) == 4
        assert np.allclose(episode.actions, scene.actions, atol=1e-5) and (episode.actions[:, 3] == 0).all()
        assert np.allclose(episode.state, scene.state, atol=1e-5)
        for at, name in enumerate(("front_left", "front_right")):
            pictures = np.stack([episode.cameras[name][step] for step in range(4)])
            assert (pictures != scene.images[:, at]).mean() < 0.02  # GL is not exact, PNG is
            assert len({picture.tobytes() for picture in pictures}) == 4
    lines = [json.loads(line) for line in (points / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and {line["question"] for line in lines} == {"point to the target"}
    places = [int(place) for place in re.findall(r"<loc(\d{4})>", lines[0]["answer"])]
    assert places == [int(1024 * value) for point in scenes[0].points[0] for value in point[::-1]]
    assert all((points / path).is_file() for line in lines for path in line["image"].values())
    with pytest.raises(SystemExit, match="exists already"):
        demonstrations.main(arguments)
    capsys.readouterr()


def test_an_interrupted_recording_does_not_look_finished(demonstrations, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demonstrations, "write_episode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        demonstrations.main([str(tmp_path / "out"), "--scenes", "1", "--frames", "1", "--workers", "1"])
    assert not (tmp_path / "out").exists()
    capsys.readouterr()


def test_the_label_is_what_the_expert_does_from_the_picture(demonstrations, scene):
    scene.reset(seed=3)  # other tests leave the arm where it was never meant to be
    rng = np.random.default_rng(3)
    demonstrations.arrange(scene, rng, fresh=False)
    start, target = scene.state[:3], scene.target
    filmed = demonstrations.film_scene(scene, rng, 8)
    assert np.array_equal(filmed.state[0, :3], start)
    ahead = np.clip(target - filmed.state[:, :3], -PLAN_STEP, PLAN_STEP)
    assert np.allclose(filmed.actions[:, :3], filmed.state[:, :3] + ahead, atol=1e-5)
    assert np.allclose(filmed.actions[-1, :3], target, atol=1e-5)
    ways = np.diff(filmed.state[:, :3], axis=0)
    assert np.linalg.norm(ways, axis=1).min() > 1e-3, "the arm is pushed about, so that frames differ"


def test_a_disturbed_target_moves_elsewhere_by_its_seed():
    robot, moved = open_robot("gym:FetchReach-v4", disturb=3), []
    for seed in (0, 1, 2, 1):
        robot.reset(seed)
        before = robot._scene.target
        for step in range(4):
            robot.act(robot._scene.plan(1)[0])
            assert np.array_equal(robot._scene.target, before) == (step < 2)
        moved.append(robot._scene.target - before)
    robot.close()
    assert np.array_equal(moved[1], moved[3]) and not np.array_equal(moved[0], moved[1])
    assert all(np.linalg.norm(by) > 0.01 for by in moved)


def test_the_expert_can_be_recorded(demonstrations, tmp_path):
    demonstrations.record_expert(tmp_path / "expert.npz", seed=2)
    robot = open_robot(f"replay:{tmp_path / 'expert.npz'}", prompt="again")
    assert robot.recorded.shape == (50, 4)
    observation = robot.observe()
    assert observation["prompt"] == "again"
    assert observation["images"]["front_right"].shape == (96, 96, 3)


def test_the_simulation_is_never_stepped_with_what_is_not_finite(scene):
    """Clipping keeps NaN, so the set-point is checked, and what is made of it."""
    scene.reset(0)
    before = scene.state
    for bad in (np.nan, np.inf, 1e300):
        with pytest.raises(RobotError, match="not finite"):
            scene.step(np.array([1.3, bad, 0.5, 0.0]))
    assert np.array_equal(scene.state, before)
    assert np.isfinite(scene.track(np.full(4, 3e38, np.float32))).all()
    scene._gripper[0] = np.nan
    with pytest.raises(RobotError, match="not finite"):
        scene.step(np.zeros(4, np.float32))
