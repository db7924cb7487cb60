"""A run in rerun (rerun.io), live or as a .rrd file: cameras, state, chunks against what was sent, guards, latency.

    camera/NAME             pictures (JPEG), each time that the robot was observed
    state                   the observed state, one series a number
    action/NAME/sent        one entity a dimension of the actions; `planned` is before the guards
    action/NAME/chunk_0..3  what each chunk predicts, from the command of its row 0 on; one chunk after the other
    chunk/number, row       where a command comes from
    latency/STAGE           milliseconds; latency/observation_age of the observation that a command goes back to
    events                  seams, guards, the end of each episode, as text

Timelines: `command` counts the commands of the whole run, `run` is the loop's clock, both with a gap between episodes.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.errors import KiEdgeError, RobotError
from ki_edge.policy.contract import PolicyContract
from ki_edge.policy.keys import under_contract_keys
from ki_edge.policy.transforms import given_pictures, read_state
from ki_runtime.robots.base import Robot

from .reporting import Step, Watcher
from .self_check import Checked
from .telemetry import Episode

LIVE = "live"
SUFFIX = ".rrd"
GAP = 10  # commands between two episodes
LANES = 4  # chunks that overlap, each in an entity of its own
QUALITY = 80  # of JPEG
COLOURS = ([33, 102, 172], [138, 138, 143], [217, 128, 50])  # sent, planned, predicted


def check_rerun(target: str) -> None:
    """RobotError unless rerun is installed and `target` is LIVE, a new .rrd file, or the URL of a viewer."""
    if find_spec("rerun") is None:
        raise RobotError(
            "--rerun needs rerun-sdk (0.5 GB): pip install 'ki-edge[rerun]'; --record makes a page without"
        )
    if target == LIVE and not _has_viewer():
        raise RobotError(f"--rerun: no program 'rerun' beside this Python or on PATH; --rerun FILE{SUFFIX} needs none")
    if target == LIVE or target.startswith("rerun+http"):
        return
    path = Path(target)
    if path.suffix != SUFFIX:
        raise RobotError(
            f"--rerun {target}: expected a file ending in {SUFFIX}, rerun+http://HOST:PORT/proxy, or nothing"
        )
    if path.exists():
        raise RobotError(f"--rerun {target}: the file exists; choose another name, or move it away")
    if not path.parent.is_dir():
        raise RobotError(f"--rerun {target}: no folder {path.parent}")


@contextmanager
def _beside_python() -> Iterator[None]:
    """Programs that pip puts beside the interpreter are found too, whether or not its environment is active."""
    before = os.environ.get("PATH")
    os.environ["PATH"] = os.pathsep.join(filter(None, [str(Path(sys.executable).parent), before]))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PATH"]
        else:
            os.environ["PATH"] = before


def _has_viewer() -> bool:
    with _beside_python():
        return shutil.which("rerun") is not None


class RerunViewer(Watcher):
    """Logs a run. `target` as of `check_rerun`, which is called here too; RobotError if no viewer can be started."""

    def __init__(self, target: str = LIVE) -> None:
        check_rerun(target)
        import rerun

        self._rr = rerun
        self._recording = rerun.RecordingStream("ki_edge")
        try:
            if target == LIVE:
                with _beside_python():
                    self._recording.spawn()
            elif target.endswith(SUFFIX):
                self._recording.save(target)
            else:
                self._recording.connect_grpc(target)
        except Exception as error:  # each platform's loader fails in its own way
            reason = " ".join(str(error).split())
            raise RobotError(f"--rerun {target}: {reason}; --rerun FILE{SUFFIX} writes a file instead") from None
        self._contract: PolicyContract | None = None
        self._names: list[str] = []
        self._rate = 1.0
        self._first = self._last = 0  # commands of the whole run: where the episode begins, and its last one
        self._began = self._now = 0.0
        self._chunks = 0
        self._waiting: dict[int, npt.NDArray[np.float64]] = {}  # chunks of which nothing was sent yet, by number

    def run_started(self, contract: PolicyContract, rate: float) -> None:
        names = contract.action_names or [f"action {dim}" for dim in range(contract.action_dim)]
        self._contract, self._rate = contract, rate
        self._names = [self._rr.escape_entity_path_part(name) for name in names]
        for name in self._names:
            for part, colour in zip(("sent", "planned"), COLOURS, strict=False):
                self._style(f"action/{name}/{part}", colour, part)
            for lane in range(LANES):
                self._style(f"action/{name}/chunk_{lane}", COLOURS[2], "predicted")
        self._recording.send_blueprint(self._blueprint())

    def episode_started(self, index: int, seed: int, robot: Robot) -> None:
        self._first, self._chunks = (self._last + GAP if index else 0), 0
        self._waiting.clear()
        self._began = self._now + GAP / self._rate if index else 0.0
        self._at(0, 0.0)
        self._say("INFO", f"episode {index} begins, seed {seed}, {robot.name}")

    def observed(self, tick: int, observation: Mapping[str, Any]) -> None:
        if self._contract is None:
            return
        try:
            state = read_state(self._contract, under_contract_keys(self._contract, observation))
            pictures = given_pictures(self._contract, observation)
        except KiEdgeError:  # the policy says what is wrong with it
            return
        self._at(tick)
        self._recording.log("state", self._rr.Scalars(state))
        for name, picture in pictures.items():
            path = f"camera/{self._rr.escape_entity_path_part(name)}"
            self._recording.log(path, self._rr.Image(picture).compress(jpeg_quality=QUALITY))

    def inferred(self, step: int, observation: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        self._waiting[self._chunks] = np.asarray(result["actions"], np.float64)
        self._waiting.pop(self._chunks - 2 * LANES, None)  # it came too late
        self._chunks += 1
        self._at(step)
        for stage, milliseconds in result.get("timing", {}).items():
            self._scalar(f"latency/{stage.removesuffix('_ms')}", milliseconds)

    def stepped(self, step: Step) -> None:
        self._at(step.tick, step.time)
        for dim, name in enumerate(self._names):
            self._scalar(f"action/{name}/sent", step.action[dim])
            if step.planned is not None:
                self._scalar(f"action/{name}/planned", step.planned[dim])
        if step.chunk is not None and step.index is not None and step.age is not None:
            self._scalar("chunk/number", step.chunk)
            self._scalar("chunk/row", step.index)
            self._scalar("latency/observation_age", 1e3 * step.age)
            self._predict(step.chunk, self._first + step.tick - step.index, self._now - step.index / self._rate)
        if step.seam:
            begins = "a hold" if step.chunk is None else f"chunk {step.chunk}, row {step.index}"
            self._say("TRACE", f"seam: {begins}")
        if step.guards:
            self._say("WARN", f"guards: {', '.join(step.guards)}")

    def checked(self, found: Checked) -> None:
        self._at(found.tick)
        if found.problem is None:
            self._scalar("self_check/disagreement", found.disagreement)
        if found.beyond or found.problem is not None:
            self._say("WARN", f"self-check: {found.problem or f'disagreement {found.disagreement:.3f}'}")

    def episode_ended(self, index: int, episode: Episode) -> None:
        outcome = {None: "success not known", True: "success", False: "no success"}[episode.success]
        self._say("INFO", f"episode {index} ends: {outcome}, {episode.steps} steps, {episode.seconds:.2f} s")

    def close(self) -> None:
        """Hand on what waits, and close the file."""
        self._recording.flush()
        self._recording.disconnect()

    def _predict(self, number: int, tick: int, time: float) -> None:
        """A chunk, once anything of it is sent; its row 0 is of this command and time. Then a gap."""
        actions = self._waiting.pop(number, None)
        if actions is None:
            return
        rows = np.arange(len(actions) + 1)
        for dim, name in enumerate(self._names):
            self._recording.send_columns(
                f"action/{name}/chunk_{number % LANES}",
                indexes=[
                    self._rr.TimeColumn("command", sequence=tick + rows),
                    self._rr.TimeColumn("run", duration=time + rows / self._rate),
                ],
                columns=self._rr.Scalars.columns(scalars=np.append(actions[:, dim], np.nan)),
            )

    def _at(self, tick: int, time: float | None = None) -> None:
        """The moment of what is logged next; without `time` where the last command was."""
        self._last = max(self._last, self._first + tick)
        if time is not None:
            self._now = self._began + time
        self._recording.set_time("command", sequence=self._first + tick)
        self._recording.set_time("run", duration=self._now)

    def _scalar(self, path: str, value: float) -> None:
        self._recording.log(path, self._rr.Scalars(float(value)))

    def _say(self, level: str, words: str) -> None:
        self._recording.log("events", self._rr.TextLog(words, level=level))

    def _style(self, path: str, colour: Sequence[int], name: str) -> None:
        self._recording.log(path, self._rr.SeriesLines(colors=colour, names=name, widths=1.5), static=True)

    def _blueprint(self) -> Any:
        """Cameras above, actions below them, chunk and latency beside; the text at the bottom."""
        import rerun.blueprint as view

        actions = [view.TimeSeriesView(name=name, origin=f"action/{name}") for name in self._names]
        keys = [] if self._contract is None else [camera.key for camera in self._contract.cameras if camera.key]
        paths = [f"camera/{self._rr.escape_entity_path_part(key)}" for key in keys]
        cameras = view.Grid(*(view.Spatial2DView(name=key, origin=at) for key, at in zip(keys, paths, strict=True)))
        left = view.Vertical(cameras, view.TimeSeriesView(name="state", origin="state"))
        right = view.Vertical(
            view.TimeSeriesView(name="chunk", origin="chunk"),
            view.TimeSeriesView(name="latency, ms", origin="latency"),
            view.TimeSeriesView(name="self-check", origin="self_check"),
            view.TextLogView(name="events", origin="events"),
        )
        return view.Blueprint(view.Horizontal(left, view.Vertical(*actions), right), collapse_panels=True)
