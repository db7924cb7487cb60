"""The loop, the recorder and ki-run, with a robot that counts and a policy that is a formula."""

import ast
import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from ki_edge.commands import tell
from ki_edge.contract import generic
from ki_edge.errors import ArgumentError, BackendError, DeviceError, RobotError
from ki_runtime import backends, cli, film, plots
from ki_runtime.loop import ControlLoop, LoopOptions, Watcher, episode_noise
from ki_runtime.recorder import Recorder
from ki_runtime.robots import EpisodeStatus
from ki_runtime.robots.replay import ReplayRobot, record_episode
from ki_runtime.telemetry import Episode, LatencyLog, RunReport

HORIZON, DIM = 5, 2


class CountingRobot:
    """Over after 7 steps; successful at step 3 in every episode, and at the end where the seed is even."""

    name, control_hz = "counting", 20.0

    def __init__(self):
        self.log = []
        self.closed = False

    def reset(self, seed=None):
        self.log.append(("reset", seed))
        self.seed, self.steps = seed, 0

    def observe(self):
        self.log.append(("observe", self.steps))
        return {"images": {}, "state": np.full(2, self.steps, np.float32), "prompt": "own prompt"}

    def act(self, action):
        assert action.dtype == np.float32
        self.log.append(("act", action.tolist()))
        self.steps += 1

    def status(self):
        success = self.steps == 3 or (self.steps >= 7 and self.seed % 2 == 0)
        return EpisodeStatus(self.steps >= 7, success, self.steps)

    def frame(self):
        return np.full((18, 33, 3), self.steps * 30, np.uint8)

    def close(self):
        self.closed = True


class FormulaPolicy:
    """The h-th action is [state, h]; keeps what it was asked."""

    contract = generic(["cam"], state_dim=2, action_dim=DIM, action_horizon=HORIZON, execute=3, model_action_dim=4)

    def __init__(self):
        self.asked = []

    def warm_up(self, **given):
        self.warmed = given

    def infer(self, observation, *, noise=None, num_steps=None):
        self.asked.append(SimpleNamespace(observation=observation, noise=noise, num_steps=num_steps))
        actions = np.stack([np.full(HORIZON, observation["state"][0]), np.arange(HORIZON)], axis=1)
        return {"actions": actions, "timing": {"prefix_ms": 2.0, "denoise_ms": 1.0, "total_ms": 3.0}}


# ---------------------------------------------------------------- the loop


def test_chunks_are_executed_and_inferred_again():
    robot, policy = CountingRobot(), FormulaPolicy()
    report = ControlLoop(policy, robot).run()
    acts = [value for event, value in robot.log if event == "act"]
    assert acts == [[0, 0], [0, 1], [0, 2], [3, 0], [3, 1], [3, 2], [6, 0]]
    assert [value for event, value in robot.log if event == "observe"] == [0, 3, 6]
    (episode,) = report.episodes
    assert (episode.steps, episode.inferences, episode.success, episode.success_any) == (7, 3, True, True)


@pytest.mark.parametrize(("execute", "inferences"), [(1, 7), (2, 4), (5, 2)])
def test_execute(execute, inferences):
    policy = FormulaPolicy()
    ControlLoop(policy, CountingRobot(), LoopOptions(execute=execute)).run()
    assert len(policy.asked) == inferences


def test_seeds_and_noise_can_be_repeated_elsewhere():
    robot, policy = CountingRobot(), FormulaPolicy()
    report = ControlLoop(policy, robot, LoopOptions(episodes=3, seed=40, num_steps=4)).run()
    assert [value for event, value in robot.log if event == "reset"] == [40, 41, 42]
    assert [episode.seed for episode in report.episodes] == [40, 41, 42]
    for i, asked in enumerate(policy.asked):
        np.testing.assert_array_equal(asked.noise, episode_noise(40 + i // 3, i % 3, (HORIZON, 4)))
        assert asked.num_steps == 4
    expected = np.random.default_rng([41, 2]).standard_normal((HORIZON, 4), np.float32)
    np.testing.assert_array_equal(episode_noise(41, 2, (HORIZON, 4)), expected)
    assert len({asked.noise.tobytes() for asked in policy.asked}) == 9


def test_success_at_the_end_and_at_any_step():
    report = ControlLoop(FormulaPolicy(), CountingRobot(), LoopOptions(episodes=4, seed=1)).run()
    assert [episode.success for episode in report.episodes] == [False, True, False, True]
    assert (report.success_rate, report.success_rate_any) == (0.5, 1.0)


def test_limit_and_prompt():
    robot, policy = CountingRobot(), FormulaPolicy()
    report = ControlLoop(policy, robot, LoopOptions(max_steps=4, prompt="mine")).run()
    assert report.episodes[0].steps == 4 and not report.episodes[0].success
    assert {asked.observation["prompt"] for asked in policy.asked} == {"mine"}


def test_pace():
    report = ControlLoop(FormulaPolicy(), CountingRobot(), LoopOptions(max_hz=100)).run()
    assert report.episodes[0].seconds >= 0.06 and report.control_hz <= 117  # 7 actions, 6 pauses of 10 ms


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": 0}, "episodes 0"),
        ({"seed": -1}, "seed -1"),
        ({"execute": 0}, "execute 0"),
        ({"execute": 6}, "execute 6: the policy gives 5 actions"),
        ({"max_steps": 0}, "max_steps 0"),
        ({"max_hz": 0.0}, "max_hz 0.0"),
        ({"num_steps": 0}, "num_steps 0"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ArgumentError, match=message):
        ControlLoop(FormulaPolicy(), CountingRobot(), LoopOptions(**options))


class Failing(FormulaPolicy):
    """Fails at its fourth inference."""

    error = BackendError("broken")

    def infer(self, observation, **options):
        if len(self.asked) == 3:
            raise self.error
        return super().infer(observation, **options)


@pytest.mark.parametrize("error", [BackendError("broken"), DeviceError("broken: lost")])
def test_an_error_closes_the_watchers_and_keeps_the_report(monkeypatch, error):
    """The robot is told nothing more, so it holds where it is."""
    monkeypatch.setattr(Failing, "error", error)
    closed, robot = [], CountingRobot()
    watcher = type("Closing", (Watcher,), {"close": lambda self: closed.append(1)})()
    loop = ControlLoop(Failing(), robot, LoopOptions(episodes=2), [watcher])
    with pytest.raises(type(error), match="broken"):
        loop.run()
    assert robot.log[-1] == ("observe", 0)
    assert closed == [1] and len(loop.report(interrupted=True).episodes) == 1


# ---------------------------------------------------------------- telemetry


def test_percentiles():
    log = LatencyLog()
    for value in range(1, 101):
        log.add({"denoise_ms": value, "extra_ms": 1.0, "prefix_ms": 2.0 * value})
    summary = log.summary()
    assert list(summary) == ["prefix_ms", "denoise_ms", "extra_ms"]
    x = summary["denoise_ms"]
    assert (x.count, x.p50, x.max, x.mean) == (100, 50.5, 100, 50.5) and x.p99 == pytest.approx(99.01)


def test_report():
    episodes = tuple(Episode(seed, 10, 2, 0.5, success=seed > 0, success_any=True) for seed in range(4))
    log = LatencyLog()
    log.add({"total_ms": 3.0})
    report = RunReport(episodes, log.summary(), 20.0)
    text = "\n".join(report.lines())
    assert "75.0 % at the end" in text and "100.0 % at any step" in text and "20.0 Hz" in text
    data = json.loads(json.dumps(report.to_json()))
    assert data["success_rate"] == 0.75 and data["latency_ms"]["total_ms"]["p99"] == 3.0
    assert data["torch_loaded"] is ("torch" in sys.modules)
    unknown = RunReport(tuple(replace(e, success=None, success_any=None) for e in episodes), {}, 0.0)
    assert unknown.success_rate is None and "success" not in "\n".join(unknown.lines())


# ---------------------------------------------------------------- the recorder


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
    assert lines[0] == {"event": "episode", "index": 0, "seed": 8, "robot": "counting"}
    inference = lines[5]
    assert inference["step"] == 3 and inference["state"] == [3, 3] and inference["prompt"] == "own prompt"
    assert inference["actions"] == [[3, h] for h in range(HORIZON)]
    assert inference["timing"]["denoise_ms"] == 1.0 and inference["timing"]["observe_ms"] > 0
    assert lines[6] == {"event": "step", "step": 3, "action": [3, 0]}
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
    (_, actions, inferences, recorded, _) = drawn[0]
    np.testing.assert_allclose(recorded - actions, 0.25)
    assert inferences == [0, 3, 6]


# ---------------------------------------------------------------- ki-run


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments, policy=, robot=) -> (exit status, stdout, stderr) of ki-run over the two above."""

    def run(*arguments, policy=None, robot=None):
        loaded = []

        def load(*positional, **options):
            loaded.append((*positional, options))
            return policy or FormulaPolicy()

        monkeypatch.setattr("ki_runtime.policy.Policy.load", load)
        monkeypatch.setattr(cli, "open_robot", lambda name: robot or CountingRobot())
        status = cli.main(["some/bundle", "--robot", "gym:FetchReach-v4", *arguments])
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err, loaded=loaded)

    return run


def test_run_prints_a_report(run):
    robot = CountingRobot()
    result = run("--episodes", "4", "--backend", "ort", "--threads", "2", "--verify", robot=robot)
    assert result.status == 0 and robot.closed
    assert "50.0 % at the end" in result.out and "100.0 % at any step" in result.out
    assert "prefix" in result.out and "control rate" in result.out and "torch loaded" in result.out
    given = {"threads": 2, "verify": True, "build": True, "trust_engines": False, "say": tell}
    assert result.loaded == [("some/bundle", "ort", given)]


def test_run_warms_up_before_the_robot_moves(run):
    robot, policy = CountingRobot(), FormulaPolicy()

    def fail(**given):
        assert given == {"prompt": "fold", "num_steps": 3} and not robot.log
        raise BackendError("no room")

    policy.warm_up = fail
    result = run("--prompt", "fold", "--num-steps", "3", "--trust-engines", robot=robot, policy=policy)
    assert result.status == 2 and robot.closed and not [event for event, _ in robot.log if event == "act"]
    assert result.loaded[0][-1]["trust_engines"] is True


def test_run_prints_json(run, tmp_path):
    result = run("--episodes", "2", "--seed", "3", "--json", "--record", str(tmp_path))
    report = json.loads(result.out)
    assert report["seed"] == 3 and [episode["seed"] for episode in report["episodes"]] == [3, 4]
    assert report["success_rate"] == 0.5 and "denoise_ms" in report["latency_ms"] and "torch_loaded" in report
    assert (tmp_path / "steps.jsonl").exists()


def test_an_error_is_one_line(run):
    robot = CountingRobot()
    result = run("--episodes", "2", policy=Failing(), robot=robot)
    assert result.status == 2 and robot.closed
    assert result.err.splitlines()[-1] == "ki-run: error: broken" and "Traceback" not in result.err


def test_options_are_checked_before_anything_is_loaded(run):
    for option, name in (("--episodes", "episodes"), ("--num-steps", "num_steps")):
        result = run(option, "0")
        assert result.status == 2 and result.loaded == [] and f"error: {name} 0" in result.err
        assert len(result.err.splitlines()) == 1


def test_interrupt(run, tmp_path):
    class Interrupted(Failing):
        error = KeyboardInterrupt()

    robot = CountingRobot()
    result = run("--episodes", "5", "--record", str(tmp_path), policy=Interrupted(), robot=robot)
    assert result.status == 130 and robot.closed
    assert "episodes      1 (interrupted)" in result.out and "Traceback" not in result.err
    assert (tmp_path / "steps.jsonl").read_text().count('"end"') == 1


def test_interrupt_while_loading(monkeypatch, capsys):
    def load(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ki_runtime.policy.Policy.load", load)
    assert cli.main(["bundle", "--robot", "gym:FetchReach-v4"]) == 130
    assert capsys.readouterr().err == "ki-run: interrupted; nothing was run\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--robot", "gym:FetchReach-v4"], "no bundle at"),
        (["--robot", "gym:FetchReach-v4", "--backend", "abacus"], "no backend 'abacus'; there are: auto, trt"),
    ],
)
def test_missing_bundle_and_unknown_backend(capsys, tmp_path, arguments, message):
    assert cli.main([str(tmp_path / "none"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ki-run: error: ") and message in error and len(error.splitlines()) == 1


def test_unknown_robot(capsys, monkeypatch):
    monkeypatch.setattr("ki_runtime.policy.Policy.load", lambda *_, **__: FormulaPolicy())
    assert cli.main(["bundle", "--robot", "gym:Unknown-v0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ki-run: error: unknown robot 'gym:Unknown-v0'") and len(error.splitlines()) == 1


def test_a_disk_that_fails_is_one_line(run):
    class Full(Failing):
        error = OSError(28, "No space left on device")

    robot = CountingRobot()
    result = run("--episodes", "2", policy=Full(), robot=robot)
    assert result.status == 2 and robot.closed
    assert result.err.splitlines()[-1] == "ki-run: error: [Errno 28] No space left on device"


def test_help_names_every_backend(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in backends.NAMES)


# ---------------------------------------------------------------- what is imported


def loaded_after(code):
    """Names of the top-level modules that a fresh interpreter has after running `code`."""
    script = f"{code}\nimport sys; print(sorted({{name.partition('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(ast.literal_eval(result.stdout.splitlines()[-1]))


def test_importing_the_package_loads_nothing_heavy():
    assert not loaded_after("import ki_runtime") & {"numpy", "PIL", "onnxruntime", "torch"}


def test_the_runtime_never_needs_torch_or_the_exporter():
    heavy = {"torch", "onnx", "ki_export", "PIL", "matplotlib", "tokenizers", "sentencepiece", "imageio", "gymnasium"}
    modules = "loop, policy, sampler, recorder, cli, decode, plots, film"
    assert not loaded_after(f"from ki_runtime import {modules}") & {*heavy, "onnxruntime"}
    assert not loaded_after("import ki_runtime.ort_session") & heavy


def test_every_public_name_is_there():
    import ki_runtime

    assert all(getattr(ki_runtime, name).__name__ == name for name in ki_runtime.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = ki_runtime.nothing


def test_a_robot_with_other_actions_is_refused():
    """Same number of actions, another meaning: the arm must not move."""
    contract = generic(["front"], state_dim=2, action_dim=2, action_horizon=4, action_names=("dx", "dy"))
    arm = SimpleNamespace(name="arm", action_names=("x", "y"))
    with pytest.raises(RobotError, match=r"arm is commanded by \(x, y\), but the policy gives \(dx, dy\)"):
        ControlLoop(SimpleNamespace(contract=contract), arm)
    ControlLoop(SimpleNamespace(contract=contract), SimpleNamespace(name="arm", action_names=("dx", "dy")))
