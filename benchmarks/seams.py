"""How chunks join, and what it does to the task: every mode and delay on the simulated arm, in lock-step.

    ki-export examples/fetch/horizon16 -o build/horizon16 --target ort
    python benchmarks/seams.py build/horizon16 --episodes 100 --seed 1000 -o build/seams

The bundle was exported with real-time chunking; where its checkpoint was trained with --rtc-max-delay, both ways are
measured. The clock is simulated, an inference takes exactly so many control steps, and the same seeds give the same
numbers on any machine. Writes seams.json, seams.md and seams.png. --disturb N moves the target after N commands.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ki_edge.bundle import Bundle
from ki_edge.errors import KiEdgeError
from ki_runtime.control.loop import ControlLoop
from ki_runtime.control.options import LoopOptions
from ki_runtime.control.reporting import Step, Watcher
from ki_runtime.control.seams import SeamLog
from ki_runtime.policy.policy import Policy
from ki_runtime.robots import open_robot

ROBOT = "gym:FetchReach-v4"
CROSSFADE = 3
SHARE = 10  # episodes that a process runs at a time
COLOURS = ("#8a8a8a", "#2166ac", "#67a9cf", "#d6604d", "#b2182b")


@dataclass(frozen=True)
class Way:
    """One row of the table: a mode, and how it joins chunks."""

    name: str
    mode: str
    crossfade: int = 0
    joined: str | None = None  # "guided" or "trained"


@dataclass(frozen=True)
class Task:
    """Some episodes of one way at one delay."""

    bundle: str
    way: Way
    delay: int
    seed: int
    episodes: int
    execute: int | None
    disturb: int | None


class Joining:
    """A policy that always joins chunks in one way."""

    def __init__(self, policy: Policy, way: str) -> None:
        self.contract, self.stats, self.rtc, self.sampler = policy.contract, policy.stats, way, policy.sampler
        self.max_delay = policy.max_delay if way == "trained" else None
        self._policy = policy

    def infer(self, observation: Any, *, previous: Any = None, way: Any = None, **given: Any) -> Any:
        return self._policy.infer(observation, previous=previous, way=self.rtc if previous else None, **given)


class Commands(Watcher):
    """All commands of all episodes, to be put together with those of the other processes; and what came of them."""

    def __init__(self) -> None:
        self.episodes: list[list[tuple[list[float], int | None]]] = []
        self.successes: list[list[bool]] = []

    def episode_started(self, index: int, seed: int, robot: Any) -> None:
        self.episodes.append([])
        self.successes.append([])
        self._robot = robot

    def stepped(self, step: Step) -> None:
        self.episodes[-1].append((step.action.tolist(), step.chunk))
        self.successes[-1].append(bool(self._robot.status().success))

    def reactions(self, disturb: int | None) -> list[int | None]:
        """Commands of each episode from the one with which the target moved until the new one is reached."""
        seen = [] if disturb is None else [found[disturb - 1 :] for found in self.successes]
        return [found.index(True) if True in found else None for found in seen]


def run(task: Task) -> dict[str, Any]:
    """The episodes of a task, in a process of its own."""
    way = task.way
    policy: Any = Policy.load(task.bundle, "ort", threads=1, say=lambda _: None)
    policy = policy if way.joined is None else Joining(policy, way.joined)
    options = LoopOptions(
        episodes=task.episodes,
        seed=task.seed,
        mode=way.mode,  # type: ignore[arg-type]
        delay=task.delay,
        crossfade=way.crossfade,
        execute=task.execute,
    )
    commands = Commands()
    loop = ControlLoop(policy, open_robot(ROBOT, disturb=task.disturb), options, [commands])
    report = loop.run()
    facts = [{"seed": one.seed, "success": one.success, "reached": one.reached} for one in report.episodes]
    gripper = [bool(flag) for flag in loop.limits.gripper]
    reactions = commands.reactions(task.disturb)
    told = {"episodes": facts, "commands": commands.episodes, "gripper": gripper, "mode": report.mode}
    return {**told, "reactions": reactions}


def percentiles(values: list[int]) -> dict[str, float] | None:
    return {f"p{at}": float(np.percentile(values, at)) for at in (50, 95)} if values else None


def gathered(way: Way, delay: int, results: list[dict[str, Any]]) -> dict[str, Any]:
    """What all episodes of a way at a delay show."""
    log = SeamLog([not flag for flag in results[0]["gripper"]])
    episodes = [episode for result in results for episode in result["episodes"]]
    for result in results:
        for commands in result["commands"]:
            log.reset()
            for action, chunk in commands:
                log.add(np.asarray(action, np.float32), chunk)
    reached = [episode["reached"] for episode in episodes if episode["reached"] is not None]
    return {
        "way": way.name,
        "mode": results[0]["mode"],
        "delay": delay,
        "episodes": len(episodes),
        "success": sum(bool(episode["success"]) for episode in episodes) / len(episodes),
        "reached_p50": float(np.median(reached)) if reached else None,
        "reaction": percentiles([moved for result in results for moved in result["reactions"] if moved is not None]),
        "seams": log.summary(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown. Position jumps in millimetres, those of velocity and acceleration in mm a step."""
    moved = ", then the moved target (p50 / p95)" if any(row["reaction"] for row in rows) else ""
    lines = [
        f"| mode | delay | success | steps to reach (median{moved}) | "
        "seam position p50 / p95 / max | p95 to p95 inside | "
        "seam velocity p95 (inside) | seam acceleration p95 (inside) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seams, inside = row["seams"], row["seams"]["inside"]
        position, ratio = seams["position"], seams["position"]["p95"] / inside["position"]["p95"]
        pairs = [f"{1e3 * seams[k]['p95']:.1f} ({1e3 * inside[k]['p95']:.1f})" for k in ("velocity", "acceleration")]
        jumps = " / ".join(f"{1e3 * position[k]:.1f}" for k in ("p50", "p95", "max"))
        reached = "" if row["reached_p50"] is None else f"{row['reached_p50']:.0f}"
        if row["reaction"]:
            reached += f", {row['reaction']['p50']:.0f} / {row['reaction']['p95']:.0f}"
        cells = [row["way"], str(row["delay"]), f"{100 * row['success']:.0f} %", reached, jumps, f"{ratio:.2f}", *pairs]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Seam jumps against steps inside chunks, and success, over the delay."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    jump, success = figure.subplots(1, 2)
    ways = list(dict.fromkeys(row["way"] for row in rows))
    for name, colour in zip(ways, COLOURS, strict=False):
        mine = [row for row in rows if row["way"] == name]
        delays = [row["delay"] for row in mine]
        ratios = [row["seams"]["position"]["p95"] / row["seams"]["inside"]["position"]["p95"] for row in mine]
        jump.plot(delays, ratios, "o-", color=colour, label=name)
        success.plot(delays, [100 * row["success"] for row in mine], "o-", color=colour)
    jump.axhline(1.0, color="#e4e4e4", zorder=0)
    jump.set_ylabel("seam jump p95 / step inside chunks p95")
    jump.set_ylim(bottom=0)
    success.set_ylabel("success, %")
    success.set_ylim(0, 102)
    for panel in (jump, success):
        panel.set_xlabel("delay, control steps")
        panel.spines[["top", "right"]].set_visible(False)
    jump.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> int:
    """Run all ways at all delays; exit status 2 for a bundle that cannot be used."""
    parser = argparse.ArgumentParser(description="Seams, success and time to reach by mode and delay.")
    parser.add_argument("bundle", help="bundle with real-time chunking")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--delays", type=int, nargs="+", default=[0, 1, 3, 6])
    parser.add_argument("--execute", type=int, help="actions of a chunk before the next inference")
    parser.add_argument("--disturb", type=int, metavar="N", help="the target moves after N commands")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/seams"))
    given = parser.parse_args()
    try:
        rtc = Bundle.open(given.bundle).manifest.config.rtc
    except KiEdgeError as error:
        print(f"seams: error: {error}", file=sys.stderr)
        return 2
    ways = [Way("sync", "sync"), Way("async", "async"), Way(f"async, crossfade {CROSSFADE}", "async", CROSSFADE)]
    ways += [Way("rtc guided", "rtc", joined="guided")] if rtc != "none" else []
    ways += [Way("rtc trained", "rtc", joined="trained")] if rtc == "trained" else []
    starts = range(0, given.episodes, SHARE)
    tasks = [
        Task(
            given.bundle,
            way,
            delay,
            given.seed + start,
            min(SHARE, given.episodes - start),
            given.execute,
            given.disturb,
        )
        for way in ways
        for delay in given.delays
        for start in starts
    ]
    with ProcessPoolExecutor(given.workers, multiprocessing.get_context("spawn")) as pool:
        results = list(tqdm(pool.map(run, tasks), total=len(tasks), unit="task"))
    size, rows = len(starts), []
    for at in range(0, len(tasks), size):
        rows.append(gathered(tasks[at].way, tasks[at].delay, results[at : at + size]))
    given.output.mkdir(parents=True, exist_ok=True)
    settings = {**asdict(tasks[0]), "episodes": given.episodes, "way": None}
    (given.output / "seams.json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    (given.output / "seams.md").write_text(table(rows) + "\n")
    plot(given.output / "seams.png", rows)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
