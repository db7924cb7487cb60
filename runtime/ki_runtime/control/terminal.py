"""How a run goes, on the terminal: a table of rich, twice a second; elsewhere, or without rich, a line now and then.

Whoever tells a watcher only leaves numbers here. They are written by a thread of the view's own, never by the one that
drives the robot.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter, deque
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import numpy as np

from ki_edge.commands import printable, tell
from ki_edge.policy.contract import PolicyContract
from ki_runtime.robots.base import Robot

from .reporting import Step, Watcher
from .self_check import Checked
from .telemetry import Episode

DRAWN_EVERY, TOLD_EVERY = 0.5, 10.0  # seconds
RECENT = 100  # commands, and inferences, that the figures are of
PATIENCE = 5.0  # seconds for the thread when the run is over


class Status(Watcher):
    """The figures of a run so far."""

    def __init__(self, episodes: int) -> None:
        self.episodes, self.ended = episodes, 0
        self.robot, self.asked = "", 0.0
        self.commands = self.held = 0
        self.successes = self.known = 0
        self.guards: Counter[str] = Counter()
        self._times: deque[float] = deque(maxlen=RECENT)
        self._latency: dict[str, deque[float]] = {}
        self._step: Step | None = None
        self._check: Checked | None = None
        self.checks = self.beyond = 0
        self._joined: deque[int] = deque(maxlen=RECENT)  # the rows at which chunks came in

    def run_started(self, contract: PolicyContract, rate: float) -> None:
        self.asked = rate

    def episode_started(self, index: int, seed: int, robot: Robot) -> None:
        self.robot = robot.name
        self._times.clear()

    def inferred(self, step: int, observation: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        for stage, milliseconds in dict(result.get("timing") or {}).items():
            self._latency.setdefault(stage.removesuffix("_ms"), deque(maxlen=RECENT)).append(float(milliseconds))

    def stepped(self, step: Step) -> None:
        self.commands += 1
        self.held += step.chunk is None
        self.guards.update(step.guards)
        self._times.append(step.time)
        if step.seam and step.index is not None:
            self._joined.append(step.index)
        self._step = step

    def checked(self, found: Checked) -> None:
        self.checks += 1
        self.beyond += found.beyond
        self._check = found

    def episode_ended(self, index: int, episode: Episode) -> None:
        self.ended += 1
        if episode.success is not None:
            self.known += 1
            self.successes += episode.success

    def rows(self) -> list[tuple[str, str]]:
        """What there is to say: pairs of a name and a value."""
        times, step = list(self._times), self._step
        pace = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else None
        rows = [("episode", f"{min(self.ended + 1, self.episodes)} of {self.episodes}, {self.robot}")]
        if self.known:
            rows.append(("success", f"{self.successes} of {self.known}"))
        rate = "" if pace is None else f"{pace:.1f} Hz of {self.asked:g}, "
        rows.append(("rate", f"{rate}{self.commands} commands{f', {self.held} held' if self.held else ''}"))
        if step is not None and step.age is not None:
            rows.append(("chunk", f"{step.chunk}, row {step.index}, observed {1e3 * step.age:.0f} ms ago"))
        if self._joined:
            rows.append(("delay", f"{np.median(list(self._joined)):g} actions"))
        rows += [(stage, f"{_p(values, 50):.1f} ms, p95 {_p(values, 95):.1f}") for stage, values in self._stages()]
        if self._check is not None:
            apart = self._check.problem or f"disagreement {self._check.disagreement:.3f}"
            beyond = f", {self.beyond} beyond the limit" if self.beyond else ""
            rows.append(("self-check", f"{apart}, {self.checks} done{beyond}"))
        rows.append(("guards", ", ".join(f"{kind} {count}" for kind, count in sorted(self.guards.items())) or "none"))
        return [(name, printable(value)) for name, value in rows]

    def line(self) -> str:
        """The same in one line, without the stages."""
        stages = dict(self._stages())
        total = [f"inference {_p(stages['total'], 50):.0f} ms"] if "total" in stages else []
        rows = [f"{name} {value}" for name, value in self.rows() if name not in stages]
        return "; ".join([*rows, *total])

    def _stages(self) -> list[tuple[str, deque[float]]]:
        return list(self._latency.items())


class TerminalView(Watcher):
    """Shows a `Status`. `say(line)` may be called by anybody: the line comes out above the table, not at once.

    A terminal that is gone does not stop the robot.
    """

    def __init__(self, episodes: int) -> None:
        self.status = Status(episodes)
        self._notes: deque[str] = deque()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def say(self, line: str) -> None:
        """A line for people; at once where nothing is shown yet, or any more."""
        if self._thread is None or self._over.is_set():
            tell(line)
        else:
            self._notes.append(line)

    def run_started(self, contract: PolicyContract, rate: float) -> None:
        self.status.run_started(contract, rate)
        drawn = find_spec("rich") is not None and sys.stderr is not None and sys.stderr.isatty()
        self._thread = threading.Thread(target=self._draw if drawn else self._tell, name="terminal", daemon=True)
        self._thread.start()

    def episode_started(self, index: int, seed: int, robot: Robot) -> None:
        self.status.episode_started(index, seed, robot)

    def inferred(self, step: int, observation: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        self.status.inferred(step, observation, result)

    def stepped(self, step: Step) -> None:
        self.status.stepped(step)

    def checked(self, found: Checked) -> None:
        self.status.checked(found)

    def episode_ended(self, index: int, episode: Episode) -> None:
        self.status.episode_ended(index, episode)

    def close(self) -> None:
        """The last figures, and what was still to be said."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(PATIENCE)
        while self._notes:
            tell(self._notes.popleft())

    def _tell(self) -> None:
        """Lines, the first after a while: a short run needs none."""
        waited = 0.0
        while not self._over.wait(DRAWN_EVERY):
            while self._notes:
                tell(self._notes.popleft())
            waited += DRAWN_EVERY
            if waited >= TOLD_EVERY:
                waited = 0.0
                tell(f"ki-run: {self.status.line()}")

    def _draw(self) -> None:
        from rich.console import Console
        from rich.live import Live

        with suppress(OSError, ValueError):
            console = Console(stderr=True, highlight=False)
            with Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live:
                over = False
                while not over:
                    over = self._over.wait(DRAWN_EVERY)
                    while self._notes:
                        console.print(printable(self._notes.popleft()), markup=False)
                    live.update(self._table(), refresh=True)

    def _table(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in self.status.rows():
            table.add_row(Text(name, style="dim"), Text(value, style="yellow" if self._warns(name, value) else ""))
        return table

    def _warns(self, name: str, value: str) -> bool:
        return (name == "guards" and value != "none") or (name == "rate" and "held" in value) or "beyond" in value


def _p(values: deque[float], percent: float) -> float:
    return float(np.percentile(list(values), percent))
