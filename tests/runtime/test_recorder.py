"""What a run leaves in a folder: steps, films, plots; and folders that are refused."""

import json
import os

import numpy as np
import pytest

from ki_edge.errors import ArgumentError, BackendError, RobotError
from ki_runtime.control.loop import ControlLoop
from ki_runtime.control.options import LoopOptions
from ki_runtime.control.recorder import Recorder
from ki_runtime.recording import film, plots
from ki_runtime.robots.replay import ReplayRobot, record_episode

from .fake_robot import HORIZON, CountingRobot, Failing, FormulaPolicy


def record(folder, robot=None, **options):
    recorder = Recorder(folder)
    ControlLoop(FormulaPolicy(), robot or CountingRobot(), LoopOptions(**options), [recorder]).run()
    return recorder


def test_steps_are_logged(tmp_path):
    record(tmp_path / "deep" / "run", episodes=2, seed=8)
    lines = [json.loads(line) for line in (tmp_path / "deep" / "run" / "steps.jsonl").read_text().splitlines()]
    events = [line["event"] for line in lines]
    one = ["episode", *["inference", *["step"] * 3] * 2, "inference", "step", "end"]
    assert events == one * 2
    facts = {"index": 0, "seed": 8, "robot": "counting", "rate": 20.0, "names": None, "recorded": None}
    assert lines[0] == {"event": "episode"} | facts
    inference = lines[5]
    assert inference["step"] == 3 and inference["state"] == [3, 3] and inference["prompt"] == "own prompt"
    assert inference["actions"] == [[3, h] for h in range(HORIZON)]
    assert inference["timing"]["denoise_ms"] == 1.0 and inference["timing"]["observe_ms"] > 0
    step = {"event": "step", "step": 3, "action": [3, 0], "chunk": 1, "index": 0, "seam": True}
    assert {key: lines[6][key] for key in step} == step and lines[6]["age"] >= 0
    assert lines[len(one) - 1]["success"] is True and lines[len(one) - 1]["seed"] == 8


# imageio-ffmpeg's reader, used only here, leaves its pipes to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_film_is_mp4(tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    record(tmp_path)
    facts, *frames = ffmpeg.read_frames(str(tmp_path / "episode_000.mp4"))
    assert facts["size"] == (32, 18) and facts["fps"] == 20.0  # the 33rd column is cut: an even size
    pixels = [np.frombuffer(frame, np.uint8).mean() for frame in frames]
    np.testing.assert_allclose(pixels, np.arange(8) * 30, atol=12)


def test_film_is_gif_without_ffmpeg(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(film, "find_spec", lambda name: None)
    record(tmp_path)
    with Image.open(tmp_path / "episode_000.gif") as image:
        assert (image.n_frames, image.size) == (8, (33, 18)) and image.info["duration"] == 50
    assert not (tmp_path / "episode_000.mp4").exists()


def test_film_refuses_frames_of_another_size(tmp_path):
    one = film.GifFilm(tmp_path / "a.gif", 10.0)
    one.add(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ArgumentError, match="8x16 in a film of 8x8"):
        one.add(np.zeros((16, 8, 3), np.uint8))


def test_a_robot_without_pictures_gives_no_film(tmp_path):
    robot = CountingRobot()
    robot.frame = lambda: None
    record(tmp_path, robot)
    assert not list(tmp_path.glob("episode_*"))


def test_only_the_first_films_are_made(tmp_path):
    recorder = Recorder(tmp_path, films=1)
    ControlLoop(FormulaPolicy(), CountingRobot(), LoopOptions(episodes=2), [recorder]).run()
    assert len(list(tmp_path.glob("episode_*"))) == 1


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    recorder = record(tmp_path, episodes=2)
    for name in ("actions_000.png", "actions_001.png", "latency.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert recorder.notes == []


def test_without_matplotlib_plots_are_skipped_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    recorder = record(tmp_path)
    assert recorder.notes == ["plots were skipped: matplotlib is not installed (pip install matplotlib)"]
    assert not list(tmp_path.glob("*.png")) and (tmp_path / "steps.jsonl").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RobotError, match=r"cannot record into .*file"):
        Recorder(tmp_path / "file")


@pytest.fixture
def recording(tmp_path):
    """A recording of 7 steps whose actions are what FormulaPolicy predicts, plus 0.25."""
    state = np.repeat(np.arange(7, dtype=np.float32)[:, None], 2, axis=1)
    actions = np.array([[t - t % 3, t % 3] for t in range(7)], np.float32) + 0.25
    images = {"cam": np.zeros((7, 8, 8, 3), np.uint8)}
    record_episode(tmp_path / "episode.npz", images=images, state=state, actions=actions, prompt="p")
    return tmp_path / "episode.npz"


def test_replay_compares_with_the_recording(recording, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "plot_actions", lambda *arguments: drawn.append(arguments))
    robot = ReplayRobot(recording)
    recorder = Recorder(tmp_path / "run")
    report = ControlLoop(FormulaPolicy(), robot, LoopOptions(), [recorder]).run()
    assert report.episodes[0].replay_error == pytest.approx(0.25)
    assert "0.25 mean |predicted - recorded|" in "\n".join(report.lines())
    (_, actions, inferences, recorded, _, names) = drawn[0]
    np.testing.assert_allclose(recorded - actions, 0.25)
    assert inferences == [0, 3, 6] and names is None


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_recording_never_touches_the_first(tmp_path):
    record(tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(RobotError, match=r"run holds a recording already \(steps\.jsonl\); choose another folder"):
        Recorder(tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "episode_000.mp4").write_text("a film of somebody else's")
    with pytest.raises(RobotError, match=r"is not empty \(episode_000\.mp4 is in it\): record into a new or an empty"):
        Recorder(tmp_path)
    (tmp_path / "episode_000.mp4").unlink()
    (tmp_path / ".hidden").write_text("")
    Recorder(tmp_path).close()


def test_an_episode_that_is_stopped_is_kept(tmp_path):
    """Film, actions and latencies up to where it was."""
    pytest.importorskip("matplotlib")
    with pytest.raises(BackendError):
        ControlLoop(Failing(), CountingRobot(), LoopOptions(episodes=2, execute=2), [Recorder(tmp_path)]).run()
    assert {"actions_000.png", "latency.png", "steps.jsonl"} <= {path.name for path in tmp_path.iterdir()}
    assert len(list(tmp_path.glob("episode_000.*"))) == 1
    assert [json.loads(line)["event"] for line in (tmp_path / "steps.jsonl").read_text().splitlines()][-1] == "step"


def test_the_state_is_logged_whatever_its_key(tmp_path):
    robot = CountingRobot()
    seen = {"observation/joint_position": np.ones(2, np.float32), "observation/image": np.zeros((4, 4, 3), np.uint8)}
    robot.observe = lambda: {**seen, "state": [1, 2], "prompt": "p", "images": {"cam": seen["observation/image"]}}
    recorder = Recorder(tmp_path)
    ControlLoop(FormulaPolicy(), robot, watchers=[recorder]).run()
    line = json.loads((tmp_path / "steps.jsonl").read_text().splitlines()[1])
    kept = {"event", "observation/joint_position", "state", "prompt", "step", "timing", "actions"}
    assert line.keys() == kept and line["observation/joint_position"] == [1.0, 1.0]


def test_a_film_that_cannot_be_written_says_why(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    one = film.open_film(tmp_path / "none" / "film", 20.0)
    one.add(np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(RobotError, match=r"the film .*film\.mp4 could not be finished: ffmpeg: .*No such file"):
        one.close()


def test_ffmpeg_does_not_hear_what_the_terminal_sends(tmp_path):
    """It leads a session of its own: Ctrl-C reaches a terminal's foreground group alone."""
    pytest.importorskip("imageio_ffmpeg")
    one = film.Mp4Film(tmp_path / "film.mp4", 20.0)
    one.add(np.zeros((16, 16, 3), np.uint8))
    assert os.getsid(one._ffmpeg.pid) == one._ffmpeg.pid != os.getsid(0)
    one.close()
