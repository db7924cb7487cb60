"""The success of an exported bundle while training: real exports and runs, and failures that end nothing."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from ki_edge.errors import ArgumentError
from ki_edge.train.watching.robot import Stopped, Trial, evaluate_robot


def test_the_shipped_policy_succeeds_as_the_bundle_that_is_exported_of_it(fetch_checkpoint, tmp_path):
    checkpoint = shutil.copytree(fetch_checkpoint, tmp_path / "checkpoint")
    before = {path: path.stat().st_mtime_ns for path in checkpoint.rglob("*") if path.is_file()}
    found = evaluate_robot(checkpoint, Trial("gym:FetchReach-v4", episodes=2), tmp_path / "step_000500")
    assert found.get("robot_error") is None, found
    assert found["robot_success"] == 1.0 and found["robot_success_any"] == 1.0 and found["robot_episodes"] == 2
    assert found["robot_seconds"] > 0
    left = {path.name for path in (tmp_path / "step_000500").iterdir()}
    assert left == {"export.log", "run.log", "run.json"}  # the bundle can be made again
    assert {path: path.stat().st_mtime_ns for path in checkpoint.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_checkpoint_that_cannot_be_exported_is_told_in_one_line(tmp_path, content):
    checkpoint = tmp_path / "step"
    checkpoint.mkdir()
    if content is not None:
        (checkpoint / "config.json").write_text(content)
    found = evaluate_robot(checkpoint, Trial("gym:FetchReach-v4"), tmp_path / "eval")
    assert found.keys() == {"robot_error"}
    assert "ki_export.cli ended with status 2: ki-export: error: " in found["robot_error"]
    assert "\n" not in found["robot_error"] and (tmp_path / "eval" / "export.log").is_file()


def test_an_evaluation_that_takes_too_long_is_ended(fetch_checkpoint, tmp_path):
    found = evaluate_robot(fetch_checkpoint, Trial("gym:FetchReach-v4", seconds=0.2), tmp_path / "eval")
    assert "took longer than 0.2 s" in found["robot_error"]
    assert not (tmp_path / "eval" / "bundle").exists()


def test_an_evaluation_that_is_stopped_ends_its_command(fetch_checkpoint, tmp_path):
    """A machine that is taken away does not wait for twenty episodes."""
    asked = []

    def stopping():
        asked.append(1)
        return len(asked) > 1  # once the export runs

    started = time.monotonic()
    with pytest.raises(Stopped):
        evaluate_robot(fetch_checkpoint, Trial("gym:FetchReach-v4"), tmp_path / "eval", stopping)
    assert len(asked) == 2 and time.monotonic() - started < 60
    assert not (tmp_path / "eval" / "bundle").exists() and not (tmp_path / "eval" / "run.log").exists()


def test_only_simulated_robots_are_moved():
    with pytest.raises(ArgumentError, match=r"--eval-robot 'lerobot:so101': expected a simulated one, gym:NAME"):
        Trial("lerobot:so101")


@pytest.mark.parametrize("bad", [{"episodes": 0}, {"seed": -1}, {"seconds": 0.0}])
def test_impossible_trials_are_refused(bad):
    with pytest.raises(ArgumentError, match="evaluation on a robot"):
        Trial("gym:FetchReach-v4", **bad)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent ended")
def test_a_command_ends_with_a_training_that_is_killed(tmp_path):
    """SIGKILL leaves no time to end anything: the command itself must notice."""
    (tmp_path / "slow.py").write_text(
        "import os, time\nopen('started', 'w').write(str(os.getpid()))\nos.rename('started', 'pid')\ntime.sleep(600)\n"
    )
    code = textwrap.dedent(
        """
        from pathlib import Path
        from ki_edge.train.watching.robot import _command
        _command("slow", [], Path("slow"), 600.0, lambda: False)
        """
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    training = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    try:
        wait_for(lambda: (tmp_path / "pid").is_file() or training.poll() is not None)
        command = int((tmp_path / "pid").read_text())
        training.send_signal(signal.SIGKILL)
        training.wait()
        wait_for(lambda: not is_running(command))
    finally:
        training.kill()
        training.wait()


def wait_for(condition, seconds=120.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def is_running(process):
    """Not so once it is gone or waits only to be reaped by whoever adopted it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False
