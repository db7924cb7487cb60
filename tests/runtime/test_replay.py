"""`replay:FILE`: a recording plays the robot; what is no recording is refused."""

import io
import zipfile

import numpy as np
import pytest

from ki_runtime.robots import EpisodeStatus, RobotError, open_robot
from ki_runtime.robots.replay import ReplayRobot, record_episode


@pytest.fixture
def episode(tmp_path):
    """A recording of 5 steps: two cameras, state [3], action [2]."""
    rng = np.random.default_rng(0)
    content = {
        "images": {name: rng.integers(0, 256, (5, 8, 6, 3), dtype=np.uint8) for name in ("left", "right")},
        "state": rng.normal(size=(5, 3)).astype(np.float32),
        "actions": rng.normal(size=(5, 2)).astype(np.float32),
        "prompt": "wave",
    }
    record_episode(tmp_path / "episode.npz", **content)
    return tmp_path / "episode.npz", content


def test_replay_shows_what_was_recorded_and_keeps_predictions(episode):
    path, content = episode
    robot = open_robot(f"replay:{path}")
    assert isinstance(robot, ReplayRobot)
    for t in range(5):
        assert robot.status() == EpisodeStatus(done=False, success=None, steps=t)
        observation = robot.observe()
        assert observation["prompt"] == "wave"
        assert np.array_equal(observation["state"], content["state"][t])
        for name, pictures in content["images"].items():
            assert np.array_equal(observation["images"][name], pictures[t])
        robot.act(content["actions"][t] + 1)
    assert robot.status().done
    assert np.array_equal(robot.predicted, content["actions"] + 1)
    assert np.array_equal(robot.recorded, content["actions"])
    assert robot.frame().shape == (8, 12, 3)
    with pytest.raises(RobotError, match="5 steps and is over"):
        robot.act(content["actions"][0])
    robot.reset(None)
    assert np.isnan(robot.predicted).all() and robot.status().steps == 0
    with pytest.raises(RobotError, match="not finite"):
        robot.act(np.array([np.inf, 0], np.float32))


def bad_files(content):
    """Name, changed arrays, words of the message."""
    good = {f"images/{k}": v for k, v in content["images"].items()}
    good |= {k: np.array(content[k]) for k in ("state", "actions", "prompt")}
    nan = np.full((5, 3), np.nan, np.float32)
    yield {k: v for k, v in good.items() if k != "actions"}, "actions is missing"
    yield {k: v for k, v in good.items() if "/" not in k}, "images/<camera> is missing"
    yield good | {"state": good["state"][:4]}, r"state is float32 \[4, 3\], expected float32 \[T, n\] with T = 5"
    yield good | {"state": np.ones((5, 3), np.int64)}, r"state is int64 \[5, 3\]"
    yield good | {"state": nan}, r"state\[0\]\[0\] is nan, which is not finite"
    yield good | {"images/left": good["images/left"].astype(np.float32)}, r"expected uint8 \[5, h, w, 3\]"
    yield good | {"prompt": np.array(3)}, "expected one string"
    yield good | {"actions": np.array([{}], object)}, "is object"


def test_bad_recordings_are_refused(episode, tmp_path):
    _, content = episode
    for number, (arrays, words) in enumerate(bad_files(content)):
        path = tmp_path / f"bad{number}.npz"
        np.savez(path, **arrays)
        with pytest.raises(RobotError, match=words):
            open_robot(f"replay:{path}")
    with pytest.raises(RobotError, match="no such file"):
        open_robot(f"replay:{tmp_path / 'none.npz'}")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(RobotError, match="arrays that can be read"):
        open_robot(f"replay:{tmp_path / 'text.npz'}")
    with pytest.raises(RobotError, match="expected uint8"):
        record_episode(tmp_path / "no.npz", **{**content, "images": {"left": content["images"]["left"][0]}})
    assert not list(tmp_path.glob("no.npz*"))


def test_a_huge_recording_is_refused_by_its_header(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 20, 1 << 10, 1 << 10, 3)}
    )
    small = io.BytesIO()
    np.save(small, np.zeros((1, 1), np.float32))
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        archive.writestr("images/left.npy", header.getvalue())
        for name in ("state", "actions", "prompt"):
            archive.writestr(f"{name}.npy", small.getvalue())
    with pytest.raises(RobotError, match="bytes of arrays, at most"):
        open_robot(f"replay:{tmp_path / 'huge.npz'}")
