"""Real signals to real processes: the robot is closed once, the report printed, the film playable."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from ki_runtime.control.interrupts import Interrupted, Interrupts
from ki_runtime.robots.replay import record_episode

STEPS = 40
# ki-run as it is, but for a policy that is a formula, and a robot that says on stderr that it was closed.
KI_RUN = """
import signal, sys, time
from types import SimpleNamespace
import numpy as np
from ki_edge.policy.contract import generic
from ki_runtime.control import cli
from ki_runtime.policy.policy import Policy
from ki_runtime.robots.replay import ReplayRobot

ignored = sys.argv[1].split(",")
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run where they are ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)
for name in filter(None, ignored):
    signal.signal(getattr(signal, name), signal.SIG_IGN)

class Slow:
    contract = generic(["cam"], state_dim=2, action_dim=2, action_horizon=4, execute=4, model_action_dim=2)
    def warm_up(self, **_):
        return SimpleNamespace(milliseconds=1.0, inference_ms=1.0)
    def infer(self, observation, *, noise=None, num_steps=None):
        time.sleep(0.02)
        return {"actions": np.zeros((4, 2))}

class Arm(ReplayRobot):
    real_time = REAL_TIME
    def act(self, action):
        time.sleep(0.005)
        super().act(action)
    def safe_stop(self):
        print("arm stopped", file=sys.stderr, flush=True)
    def close(self):
        print("arm closed", file=sys.stderr, flush=True)
        time.sleep(CLOSING)

Policy.load = lambda *_, **__: Slow()
cli.open_robot = lambda spec: Arm(spec.partition(":")[2])
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.fixture
def episode(tmp_path):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (STEPS, 48, 64, 3), dtype=np.uint8)
    numbers = np.zeros((STEPS, 2), np.float32)
    record_episode(tmp_path / "episode.npz", images={"cam": pictures}, state=numbers, actions=numbers, prompt="p")
    return tmp_path / "episode.npz"


@pytest.fixture
def started(episode, tmp_path):
    """started(ignored="", closing=0.0) -> a ki-run that records into tmp_path/run and has sent some actions."""
    running = []

    def start(ignored="", closing=0.0, episodes="100000", mode="sync", flags=(), **options):
        code = KI_RUN.replace("CLOSING", str(closing)).replace("REAL_TIME", str(mode != "sync"))
        arguments = [
            "bundle",
            "--robot",
            f"replay:{episode}",
            "--episodes",
            episodes,
            "--record",
            str(tmp_path / "run"),
            *("--mode", mode, *flags),
        ]
        process = subprocess.Popen(
            [sys.executable, "-c", code, ignored, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **options,
        )  # fmt: skip
        running.append(process)
        wait_for_steps(process, tmp_path / "run" / "steps.jsonl", 10)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def wait_for_steps(process, log, count):
    while not log.exists() or log.read_text().count('"event": "step"') < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def frames(folder):
    """How many frames the last film holds, decoded one by one."""
    program = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    film = max(folder.glob("episode_*.mp4"))
    command = [program, "-v", "error", "-xerror", "-i", str(film), "-f", "framemd5", "-"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    return sum(not line.startswith("#") for line in result.stdout.splitlines())


def last_episode(folder):
    """Steps of the last episode in the log."""
    events = [json.loads(line)["event"] for line in (folder / "steps.jsonl").read_text().splitlines()]
    start = len(events) - 1 - events[::-1].index("episode")
    return events[start:].count("step")


def check(process, out, err, status, folder):
    assert process.returncode == status, err
    assert err.count("arm stopped") == err.count("arm closed") == 1 and "Traceback" not in err
    assert err.index("arm stopped") < err.index("arm closed")
    assert "(interrupted)" in out and f"recorded      {folder}" in out
    assert frames(folder) == last_episode(folder) + 1  # one before the first action
    assert (folder / "actions_000.png").exists() and (folder / "latency.png").exists()


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_to_the_process_alone(started, tmp_path, name, status):
    pytest.importorskip("matplotlib")
    process = started()
    process.send_signal(getattr(signal, name))
    check(process, *process.communicate(timeout=120), status, tmp_path / "run")


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_while_the_policy_computes_beside(started, tmp_path, name, status):
    pytest.importorskip("matplotlib")
    process = started(mode="async")
    process.send_signal(getattr(signal, name))
    check(process, *process.communicate(timeout=120), status, tmp_path / "run")


def test_the_stop_file(started, tmp_path):
    pytest.importorskip("matplotlib")
    process = started(mode="async", flags=("--stop-file", str(tmp_path / "stop")))
    (tmp_path / "stop").touch()
    out, err = process.communicate(timeout=120)
    check(process, out, err, 130, tmp_path / "run")
    assert "stop appeared" in err


def test_the_seconds_of_a_run(started, tmp_path):
    process = started(mode="async", flags=("--max-seconds", "1"))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "(interrupted)" in out and err.count("arm closed") == 1


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_to_the_whole_group(started, tmp_path, name):
    """As a terminal sends Ctrl-C: ffmpeg is not in the group."""
    pytest.importorskip("matplotlib")
    process = started()
    os.killpg(process.pid, getattr(signal, name))
    check(process, *process.communicate(timeout=120), 128 + getattr(signal, name), tmp_path / "run")


def test_a_second_signal_while_the_robot_is_closed(started, tmp_path):
    pytest.importorskip("matplotlib")
    process = started(closing=3)
    process.send_signal(signal.SIGTERM)
    said = ""
    while "arm closed" not in said:
        line = process.stderr.readline()
        assert line
        said += line
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert "SIGINT: the robot is being closed and the recording finished first" in err
    check(process, out, said + err, 143, tmp_path / "run")


def test_signals_that_were_ignored_stay_ignored(started, tmp_path):
    """SIGHUP under nohup, SIGINT of background programs; SIGTERM still works."""
    process = started("SIGHUP,SIGINT")
    log = tmp_path / "run" / "steps.jsonl"
    for ignored in (signal.SIGHUP, signal.SIGINT):
        process.send_signal(ignored)
        wait_for_steps(process, log, log.read_text().count('"event": "step"') + 10)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143 and err.count("arm closed") == 1


def test_a_film_outlives_its_process(started, tmp_path):
    process = started()
    process.kill()
    process.communicate()
    film = tmp_path / "run" / "episode_000.mp4"
    before = -1
    while film.stat().st_size != before or not before:  # ffmpeg has seen the end of its input and finishes the file
        before = film.stat().st_size
        time.sleep(0.5)
    assert frames(tmp_path / "run") >= 1


def test_a_killed_process_loses_no_finished_episode(started, tmp_path):
    """What a robot does whose computer is gone is its own controller's affair."""
    process = started()
    log = tmp_path / "run" / "steps.jsonl"
    while log.read_text().count('"event": "end"') < 2:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    whole = log.read_text().rpartition("\n")[0].splitlines()
    events = [json.loads(line) for line in whole]
    assert [event["steps"] for event in events if event["event"] == "end"][:2] == [STEPS, STEPS]


def test_standard_output_that_nobody_reads(started):
    process = started(episodes="1")
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=120) == 128 + signal.SIGPIPE, err
    assert err.count("arm closed") == 1 and "Traceback" not in err and "Broken pipe" not in err


# ---------------------------------------------------------------- in this process


def test_a_signal_waits_while_the_robot_is_spoken_to():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    done = []
    with Interrupts() as interrupts:
        with pytest.raises(Interrupted) as caught, interrupts.held():
            signal.raise_signal(signal.SIGTERM)
            done.append("spoken")
            with interrupts.released():
                done.append("computed")
        assert (done, caught.value.signum) == (["spoken"], signal.SIGTERM)
        with pytest.raises(Interrupted), interrupts.held():
            signal.raise_signal(signal.SIGTERM)
            done.append("waits")
            signal.raise_signal(signal.SIGTERM)  # the second is for a robot that hangs
            done.append("hangs")
        assert done == ["spoken", "waits"]
        with pytest.raises(Interrupted), interrupts.held(), interrupts.finishing():
            for _ in range(3):
                signal.raise_signal(signal.SIGTERM)
                done.append("finishing")
        assert done == ["spoken", "waits", "finishing", "finishing"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_handlers_of_the_program_stay():
    mine = lambda *_: None  # noqa: E731
    before = signal.signal(signal.SIGTERM, mine)
    try:
        with Interrupts(), Interrupts():
            assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_loop_in_a_thread_installs_nothing():
    found = []

    def run():
        with Interrupts():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]
