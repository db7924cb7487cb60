"""The dataset of a recorded run: what it holds, read back, replayed; and what is left of it when a run is cut off."""

import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from ki_edge.errors import BackendError, RobotError
from ki_edge.recordings.collection import open_recordings
from ki_edge.recordings.episodes import EpisodeView
from ki_runtime.recording import dataset
from ki_runtime.robots import open_robot

from .fake_robot import Counting, Line
from .recorded_runs import CAMERAS, STEPS, Cut, Filmed, Plan, level, record

pq = pytest.importorskip("pyarrow.parquet", reason="pip install 'ki-edge[record]'")
pytest.importorskip("av", reason="pip install 'ki-edge[record]'")


def columns(folder, episode=0):
    table = pq.read_table(folder / f"data/chunk-000/file-{episode:03d}.parquet")
    return {name: np.array(values) for name, values in table.to_pydict().items()}


def outcomes(folder):
    """The columns of meta/episodes of all episodes."""
    paths = sorted((folder / "meta/episodes").glob("*/*.parquet"))
    return [pq.read_table(path).to_pylist()[0] for path in paths]


def check(folder, episodes, *, every_tick):
    """Frames of whole episodes, through our own reader."""
    recordings = open_recordings(folder)
    assert len(recordings) == len(episodes)
    for number, seed in enumerate(episodes):
        episode = recordings.episode(number)
        view = EpisodeView(episode, Plan.contract)
        assert len(view) == STEPS
        for step in range(STEPS):
            seen = step if every_tick else step - step % 4  # the last observation that the policy was given
            observation = view.observation(step)
            assert observation["state"].tolist() == [seen, seed, 0.5] and observation["prompt"] == "count"
            for name, (height, width) in CAMERAS.items():
                picture = observation["images"][name]
                assert picture.shape == (height // 2 * 2, width // 2 * 2, 3)
                assert abs(picture.mean() - level(seen, seed)) < 3


@pytest.mark.parametrize("every_tick", [False, True])
def test_frames_are_those_of_the_run(tmp_path, every_tick):
    record(tmp_path, episodes=3, seed=4, every_tick=every_tick)
    check(tmp_path, (4, 5, 6), every_tick=every_tick)
    found = columns(tmp_path, 1)
    step, row = np.arange(STEPS), np.arange(STEPS) % 4
    np.testing.assert_array_equal(found["action"], np.stack([np.minimum(step, 6), -row], axis=1))  # 6 is the limit
    np.testing.assert_array_equal(found["ki.planned"][:, 0], step)
    np.testing.assert_array_equal(found["ki.guards"].any(axis=1), step > 6)
    names = json.loads((tmp_path / "meta/info.json").read_text())["features"]["ki.guards"]["names"]
    assert names[int(found["ki.guards"][-1].argmax())] == "position"
    np.testing.assert_array_equal(found["ki.chunk"], step // 4)
    np.testing.assert_array_equal(found["ki.chunk_row"], row)
    np.testing.assert_array_equal(found["ki.seam"], (row == 0) & (step > 0))
    np.testing.assert_array_equal(found["ki.tick"], step)
    np.testing.assert_allclose(found["ki.picture_age"], 0 if every_tick else row / 20, atol=1e-6)
    assert (np.diff(found["ki.time"]) > 0).all() and (found["ki.observation_age"] >= 0).all()
    np.testing.assert_allclose(found["timestamp"], step / 20, atol=1e-6)
    np.testing.assert_array_equal(found["index"], STEPS + step)
    said = outcomes(tmp_path)
    assert [row["ki.success"] for row in said] == [True, False, True] and [row["ki.seed"] for row in said] == [4, 5, 6]
    assert not any(row["ki.stopped"] or row["ki.dropped"] for row in said) and said[0]["ki.inferences"] == 3


def test_the_state_between_observations_is_measured_where_a_robot_can(tmp_path):
    robot = Filmed()
    robot.measure = lambda: np.array([robot.steps, robot.seed, 0.25])
    record(tmp_path, robot)
    expected = [[step, 0, 0.5 if step % 4 == 0 else 0.25] for step in range(STEPS)]
    np.testing.assert_array_equal(columns(tmp_path)["observation.state"], expected)


def test_a_replay_of_it_is_the_run_again(tmp_path):
    record(tmp_path / "one", episodes=2, every_tick=True)
    robot = open_robot(f"replay:{tmp_path / 'one'}")
    report = record(tmp_path / "two", robot, every_tick=True, episodes=2)
    clamped = (1 + 2) / (2 * STEPS)  # of the two last actions; a replay has no such limit
    assert [episode.replay_error for episode in report.episodes] == [pytest.approx(clamped)] * 2
    for episode in range(2):
        one, two = columns(tmp_path / "one", episode), columns(tmp_path / "two", episode)
        for name in ("observation.state", "ki.chunk", "ki.chunk_row", "timestamp"):
            np.testing.assert_array_equal(one[name], two[name])


def test_an_episode_that_is_stopped_is_kept_and_says_so(tmp_path):
    with pytest.raises(BackendError):
        record(tmp_path, policy=Cut(), episodes=5)
    said = outcomes(tmp_path)
    assert [row["ki.stopped"] for row in said] == [False, False, True]
    assert [row["ki.success"] for row in said] == [True, False, None] and 1 <= said[2]["length"] < STEPS
    assert len(open_recordings(tmp_path).episode(2)) == said[2]["length"]


def test_cut_off_at_any_moment_all_finished_episodes_are_there(tmp_path, monkeypatch):
    """A copy of the folder before and after every file that gets its name: what SIGKILL would leave."""
    moments = []
    replace = Path.replace

    def snap():
        if (tmp_path / "run" / "meta/info.json").exists():
            shutil.copytree(tmp_path / "run", tmp_path / "left" / str(len(moments)))
            done = json.loads((tmp_path / "run" / "meta/info.json").read_text())["total_episodes"]
            moments.append(done)

    def watched(self, target):
        snap()
        found = replace(self, target)
        snap()
        return found

    monkeypatch.setattr(Path, "replace", watched)
    record(tmp_path / "run", episodes=3, every_tick=True)
    assert moments.count(1) >= 10 and moments.count(2) >= 10
    for moment, done in enumerate(moments):
        recordings = open_recordings(tmp_path / "left" / str(moment))
        assert done <= len(recordings) <= done + 1  # the next one is complete before it is counted
        for number in range(len(recordings)):
            view = EpisodeView(recordings.episode(number), Plan.contract)
            assert len(view) == STEPS and abs(view.pictures(STEPS - 1)[0].mean() - level(STEPS - 1, number)) < 3


def test_a_killed_process_leaves_its_finished_episodes(tmp_path):
    code = "import sys; from tests.runtime.recorded_runs import record; record(sys.argv[1], episodes=100000)"
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "run"], cwd=root) as process:
        log = tmp_path / "run" / "steps.jsonl"
        while not log.exists() or log.read_text().count('"event": "end"') < 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    ended = log.read_text().count('"event": "end"')
    recordings = open_recordings(tmp_path / "run")
    assert len(recordings) in (ended, ended + 1)
    check(tmp_path / "run", range(len(recordings)), every_tick=False)


def test_a_full_disk_keeps_the_episodes_before(tmp_path, largest_file, monkeypatch):
    """From the second episode on no file may grow beyond 500 bytes."""
    begin = dataset.DatasetWriter.begin
    limits = ExitStack()

    def fill(self):
        begin(self)
        if self.episodes == 1:
            limits.enter_context(largest_file(500))

    monkeypatch.setattr(dataset.DatasetWriter, "begin", fill)
    with limits, pytest.raises((RobotError, OSError), match="File too large"):
        record(tmp_path / "run", episodes=3)
    check(tmp_path / "run", (0,), every_tick=False)
    assert not list((tmp_path / "run").rglob("*.partial"))


class Changing(Filmed):
    """From the fifth command on one camera is gone and the other gives larger pictures."""

    def observe(self):
        found = super().observe()
        if self.steps >= 4:
            found["images"] = {"front": np.full((64, 96, 3), 255, np.uint8)}
        return found


def test_cameras_that_change_are_black_or_as_they_were(tmp_path):
    policy = Plan()
    record(tmp_path, Changing(), policy, episodes=2)
    view = EpisodeView(open_recordings(tmp_path).episode(0), policy.contract)
    assert abs(view.observation(8)["images"]["front"].mean() - level(0, 0)) < 3
    assert abs(view.observation(8)["images"]["wrist/left"].mean() - level(0, 0)) < 3


def test_without_the_packages_nothing_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "find_spec", lambda name: None)
    with pytest.raises(RobotError, match=r"needs pyarrow and av: pip install 'ki-edge\[record\]'$"):
        record(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_numbers_of_one_dimension(tmp_path):
    record(tmp_path, Line(steps=6), Counting())
    episode = open_recordings(tmp_path).episode(0)
    assert episode.state.shape == episode.actions.shape == (6, 1)
