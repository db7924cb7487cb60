"""ki-run: run a bundle on a robot."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from ki_edge.commands import INTERRUPTED, Parser, run_command, show, show_json, tell

from .backends import NAMES
from .loop import ControlLoop, LoopOptions, Watcher
from .recorder import Recorder
from .robots import Robot, open_robot
from .telemetry import Episode


class Progress(Watcher):
    """A bar over the episodes with the successes so far."""

    def __init__(self, episodes: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=episodes, unit="episode", disable=None)
        self._successes = 0

    def episode_ended(self, index: int, episode: Episode) -> None:
        if episode.success is not None:
            self._successes += episode.success
            self._bar.set_postfix_str(f"success {self._successes}/{index + 1}", refresh=False)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 for an error, which is one line on stderr; 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    return run_command("ki-run", lambda: _run(options), "nothing was run")


def _run(options: argparse.Namespace) -> int:
    from .policy import Policy

    loop_options = LoopOptions(
        episodes=options.episodes,
        seed=options.seed,
        execute=options.execute,
        num_steps=options.num_steps,
        prompt=options.prompt,
        max_steps=options.max_steps,
        max_hz=options.max_hz,
    )
    policy = Policy.load(options.bundle, options.backend, threads=options.threads, verify=options.verify, say=tell)
    robot: Robot = open_robot(options.robot)
    try:
        loop = ControlLoop(policy, robot, loop_options)  # refuses what does not fit before anything is written
        recorder = Recorder(options.record) if options.record else None
        loop.watch(Progress(options.episodes), *([recorder] if recorder else []))
        try:
            report, status = loop.run(), 0
        except KeyboardInterrupt:
            report, status = loop.report(interrupted=True), INTERRUPTED
    finally:
        robot.close()
    notes = recorder.notes if recorder else []
    _print(options, report.to_json(), [*report.lines(), *notes])
    return status


def _print(options: argparse.Namespace, report: dict[str, Any], lines: list[str]) -> None:
    if options.json:
        show_json({"bundle": options.bundle, "robot": options.robot, "seed": options.seed, **report})
        return
    if options.record:
        lines = [*lines, f"recorded      {options.record}"]
    elif options.robot.startswith("replay:"):
        lines = [*lines, "add --record DIR to plot the predicted actions against the recorded ones"]
    show(lines)


def _parser() -> Parser:
    defaults = LoopOptions()
    parser = Parser(prog="ki-run", description="Run a bundle on a robot, or on a recording of one.")
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="folder written by ki-export")
    add("--robot", required=True, metavar="NAME", help="gym:FetchReach-v4, or replay:FILE for a recorded episode")
    add("--episodes", type=int, default=defaults.episodes, metavar="N", help="default %(default)s")
    add("--seed", type=int, default=defaults.seed, metavar="S", help="episode i uses seed S + i; default %(default)s")
    add("--prompt", metavar="TEXT", help="instruction, instead of the robot's own")
    add("--backend", default="auto", metavar="NAME", help=f"{', '.join(NAMES)}; default: the fastest one that can")
    add("--threads", type=int, metavar="N", help="CPU threads of the engine; default: its own choice")
    add("--num-steps", type=int, metavar="N", help="denoising steps; default: the bundle's")
    add("--execute", type=int, metavar="K", help="actions executed per inference; default: the contract's")
    add("--max-steps", type=int, metavar="N", help="end an episode after N actions")
    add("--max-hz", type=float, metavar="HZ", help="actions a second at most; default: as fast as the robot takes them")
    add("--record", metavar="DIR", help="keep films, steps.jsonl and plots in this folder")
    add("--json", action="store_true", help="print the report as JSON")
    add("--verify", action="store_true", help="check the bundle's hashes before running")
    return parser


if __name__ == "__main__":
    sys.exit(main())
