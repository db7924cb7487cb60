"""How often the policy succeeds on a robot, as the bundle that will run: by the commands that users have for both.

Both are processes of their own: an export that fails, or a simulator that crashes, tells so and ends no training.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ki_edge.errors import ArgumentError, CheckpointError, KiEdgeError, RobotError
from ki_edge.files.reading import read_object
from ki_edge.files.writing import writing

CHILD, EXPORT, RUN = "ki_edge.train.watching.child", "ki_export.cli", "ki_runtime.control.cli"
MAX_REPORT = 64_000_000  # bytes of what ki-run --json prints
LOOK = 0.5  # seconds between looks whether an evaluation is to stop
TAIL = 4000  # bytes of a log whose last line says why a command failed
# What a launcher says of the training's own processes is none of these commands' business.
OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class Stopped(Exception):
    """An evaluation was to stop, and nothing was measured."""


@dataclass(frozen=True)
class Trial:
    """What is tried: `episodes` on `robot` (gym:...), episode i with seed + i, the same at every evaluation.

    `seconds`: the most that export and run may take, each. `export`, `run`: more options of the two commands.
    """

    robot: str
    episodes: int = 20
    seed: int = 1000
    seconds: float = 3600.0
    export: tuple[str, ...] = ("--target", "ort", "--link")
    run: tuple[str, ...] = ("--mode", "sync", "--unpaced")

    def __post_init__(self) -> None:
        if not self.robot.startswith("gym:"):
            raise ArgumentError(
                f"--eval-robot {self.robot!r:.60}: expected a simulated one, gym:NAME: training moves no real robot"
            )
        if self.episodes < 1 or self.seed < 0 or not self.seconds > 0:
            raise ArgumentError(
                f"evaluation on a robot: {self.episodes} episodes from seed {self.seed} within {self.seconds:g} s: "
                "expected at least 1, 0 or more, and more than 0"
            )


def evaluate_robot(
    checkpoint: Path, trial: Trial, folder: Path, stopping: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Export a checkpoint's folder and run it; what happened is kept in `folder` (OUT/training/eval/step_N).

    Returns `robot_success` (the rate at the episodes' ends), `robot_success_any` (at any time), `robot_episodes`,
    `robot_seconds`, or `robot_error`, one line, where an evaluation failed. CheckpointError only if `folder` cannot
    be written; Stopped once `stopping` says so.
    """
    started = time.monotonic()
    with writing(folder, CheckpointError):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / "bundle", ignore_errors=True)
    bundle, report = folder / "bundle", folder / "run.json"
    try:
        export = [str(checkpoint), "-o", str(bundle), "--force", *trial.export]
        _command(EXPORT, export, folder / "export", trial.seconds, stopping)
        arguments = [str(bundle), "--robot", trial.robot, "--episodes", str(trial.episodes), "--seed", str(trial.seed)]
        _command(RUN, [*arguments, "--json", *trial.run], folder / "run", trial.seconds, stopping, report)
        found = _success(report)
    except KiEdgeError as error:
        return {"robot_error": str(error)}
    finally:
        shutil.rmtree(bundle, ignore_errors=True)  # it can be made again from the checkpoint
    return {**found, "robot_seconds": round(time.monotonic() - started, 1)}


def _success(report: Path) -> dict[str, Any]:
    content = read_object(report, RobotError, MAX_REPORT)
    episodes, rates = content.get("episodes"), [content.get(name) for name in ("success_rate", "success_rate_any")]
    if not isinstance(episodes, list) or not all(isinstance(rate, int | float) for rate in rates):
        raise RobotError(f"{report}: the robot does not tell whether an episode was a success")
    return {"robot_success": rates[0], "robot_success_any": rates[1], "robot_episodes": len(episodes)}


def _command(
    module: str,
    arguments: Sequence[str],
    log: Path,
    seconds: float,
    stopping: Callable[[], bool],
    output: Path | None = None,
) -> None:
    """Run a command of this project to its end. RobotError with its last line if it fails or takes too long.

    Its messages are in LOG.log; what it prints too, or in `output`. Whatever ends the wait ends the command.
    """
    messages = log.with_suffix(".log")
    command = [sys.executable, "-m", CHILD, str(os.getpid()), module, *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in OF_LAUNCHERS}
    with writing(messages, CheckpointError), messages.open("wb") as errors, (output or messages).open("ab") as out:
        out.truncate(0)
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, env=environment, start_new_session=True
        )
    try:
        status = _waited(process, seconds, stopping)
    finally:
        _end(process)
    if status is None:
        raise RobotError(f"{module} took longer than {seconds:g} s: see {messages}")
    if status != 0:
        raise RobotError(f"{module} ended with status {status}: {_last_line(messages)} (see {messages})")


def _waited(process: subprocess.Popen[bytes], seconds: float, stopping: Callable[[], bool]) -> int | None:
    """The exit status of a command; None if it takes too long."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if stopping():
            raise Stopped
        with suppress(subprocess.TimeoutExpired):
            return process.wait(min(left, LOOK))
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command, and what it started, if it has not ended."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_line(messages: Path) -> str:
    try:
        with messages.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
    except OSError as error:
        return error.strerror or "its messages cannot be read"
    return lines[-1] if lines else "it said nothing"
