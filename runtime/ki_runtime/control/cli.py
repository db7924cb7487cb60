"""ki-run: run a bundle on a robot."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import fields

from ki_edge.commands import Parser, run_command, show, show_json, tell
from ki_edge.errors import ArgumentError
from ki_runtime.backends.registry import NAMES
from ki_runtime.recording.dataset import check_packages
from ki_runtime.robots import open_robot

from .fit import is_paced
from .interrupts import Interrupts
from .limit_sources import limits_for
from .limits_table import limit_lines
from .loop import ControlLoop
from .options import MODES, LoopOptions
from .recorder import Recorder, check_folder
from .rerun_viewer import LIVE, RerunViewer, check_rerun
from .self_check_file import read_limit, save_limit
from .terminal import TerminalView

MODE_HELP = (
    "sync: the robot waits for each inference; async: it goes on with the last chunk; rtc: and chunks join without a "
    "jump; default: %(default)s"
)
TRUST_HELP = "load engines that were built elsewhere and bring code of their own to run"
OWN = {"close_robot"}  # options of the loop that are no options of the command


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 for an error, which is one line on stderr; 128 + n after signal n (130 for Ctrl-C)."""
    options = _parser().parse_args(arguments)
    return run_command("ki-run", lambda: _run(options), "nothing was run")


def _run(options: argparse.Namespace) -> int:
    from ki_runtime.policy.policy import Policy

    if options.record:  # before a large model is loaded, and engines are built
        check_folder(options.record)
        check_packages()
    if options.rerun is not None:
        check_rerun(options.rerun)
    if options.self_check_limit is not None:
        options.self_check_limit = read_limit(options.self_check_limit)
    if options.self_check_save is not None and options.self_check is None:
        raise ArgumentError("--self-check-save is of a self-check: say every how many seconds (--self-check)")
    told = {one.name for one in fields(LoopOptions)} - OWN
    loop_options = LoopOptions(**{name: getattr(options, name) for name in told})
    if options.show_limits:
        return _show_limits(options)
    if options.disturb is not None and not options.robot.startswith("gym:"):
        raise ArgumentError(f"--disturb moves the target of a simulated arm (gym:...); {options.robot} has none")
    policy = Policy.load(
        options.bundle,
        options.backend,
        threads=options.threads,
        verify=options.verify if options.digest is None else options.digest,
        build=True,
        trust_engines=options.trust_engines,
        say=tell,
    )
    with Interrupts() as interrupts, interrupts.held(), ExitStack() as opened:
        robot = open_robot(options.robot, **({} if options.disturb is None else {"disturb": options.disturb}))
        opened.callback(robot.close)
        view = TerminalView(options.episodes)
        loop = ControlLoop(policy, robot, loop_options, interrupts=interrupts, say=view.say)
        with interrupts.released():
            prepared = policy.warm_up(
                prompt=options.prompt, num_steps=options.num_steps, fast=loop.self_check is not None
            )  # before anything moves
        loop.expect(prepared.inference_ms)
        seconds = prepared.milliseconds / 1e3
        tell(f"ki-run: warmed up in {seconds:.1f} s; an inference takes {prepared.inference_ms:.0f} ms")
        if (warning := loop.limits.warning()) is not None:
            tell(f"ki-run: {warning} (--limits FILE)")
        recorder = None
        if options.record:  # nothing was written before
            every = options.record_every_tick or options.delay is not None or not is_paced(loop_options, robot)
            recorder = Recorder(options.record, every_tick=every)
        viewers = [] if options.rerun is None else [RerunViewer(options.rerun)]
        loop.watch(view, *([recorder] if recorder else []), *viewers)
        opened.pop_all()  # from here on the loop closes the robot
        status = 0
        try:
            loop.run()
        except KeyboardInterrupt as stop:
            tell(f"ki-run: {stop or 'interrupted'}")
            status = 128 + int(getattr(stop, "signum", signal.SIGINT))
        except Exception:
            with suppress(OSError):
                _print(options, loop, recorder, interrupted=True)
            raise
        _print(options, loop, recorder, interrupted=status != 0)
        if loop.self_check is not None and options.self_check_save is not None and status == 0:
            limit = save_limit(options.self_check_save, loop.self_check.disagreements())
            tell(f"ki-run: a disagreement of {limit:.3g} is the limit that {options.self_check_save} keeps")
    return status


def _show_limits(options: argparse.Namespace) -> int:
    """The limits that a run would have, with their origin. The model is not opened, the robot does not move."""
    from ki_edge.bundle import Bundle
    from ki_runtime.policy.policy import read_assets

    assets = read_assets(Bundle.open(options.bundle))
    robot = open_robot(options.robot)
    try:
        limits = limits_for(assets.contract, assets.stats, robot, options.limits)
    finally:
        robot.close()
    show(limit_lines(limits))
    return 0


def _print(options: argparse.Namespace, loop: ControlLoop, recorder: Recorder | None, *, interrupted: bool) -> None:
    report = loop.report(interrupted=interrupted)
    if options.json:
        facts = {"bundle": options.bundle, "robot": options.robot, "seed": options.seed, **report.to_json()}
        show_json(facts)
        return
    lines = [*report.lines(), *(recorder.notes if recorder else ())]
    if options.verbose:
        lines.append(f"torch loaded  {'yes' if 'torch' in sys.modules else 'no'}")
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
    add("--robot", required=True, metavar="NAME", help="gym:FetchReach-v4, or replay:PATH for recorded episodes")
    add("--episodes", type=int, default=defaults.episodes, metavar="N", help="default %(default)s")
    add("--seed", type=int, default=defaults.seed, metavar="S", help="episode i uses seed S + i; default %(default)s")
    add("--prompt", metavar="TEXT", help="instruction, instead of the robot's own")
    add("--max-steps", type=int, metavar="N", help="end an episode after N commands")
    add("--max-seconds", type=float, metavar="S", help="stop the run after S seconds")
    add("--disturb", type=int, metavar="N", help="simulated arm: the target moves after N commands of an episode")
    add("--record", metavar="DIR", help="keep a LeRobotDataset, films, plots and run.html in this folder")
    add(
        "--record-every-tick",
        action="store_true",
        help="for it observe at every tick, where the robot is not waited for",
    )
    add("--rerun", nargs="?", const=LIVE, metavar="FILE.rrd", help="show the run in rerun, or write it for rerun")
    add("--json", action="store_true", help="print the report as JSON")
    add("--verbose", action="store_true", help="also say whether PyTorch was loaded, which a robot does not need")
    _add_loop(parser.add_argument_group("the loop").add_argument)
    _add_safety(parser.add_argument_group("safety, see docs/safety.md").add_argument, defaults)
    _add_check(parser.add_argument_group("the self-check, see docs/self-check.md").add_argument)
    _add_engine(parser.add_argument_group("the engine").add_argument)
    return parser


def _add_check(add: Callable[..., object]) -> None:
    add("--self-check", type=float, metavar="S", help="compare flow and FAST actions every S seconds, in spare time")
    add("--self-check-limit", metavar="X|FILE", help="hold where they disagree by more than this")
    add("--self-check-save", metavar="FILE", help="keep the limit that follows from this run, which was a normal one")


def _add_loop(add: Callable[..., object]) -> None:
    add("--mode", choices=MODES, default="sync", help=MODE_HELP)
    add("--rate", type=float, metavar="HZ", help="commands a second; default: the contract's, else the robot's")
    add("--unpaced", dest="paced", action="store_false", help="as fast as the robot takes commands, for simulators")
    add("--delay", type=int, metavar="N", help="lock-step on a simulated clock: an inference takes exactly N commands")
    add("--crossfade", type=int, default=0, metavar="K", help="mode async: blend a new chunk in over K actions")
    add(
        "--execute", type=int, metavar="K", help="actions to execute before the next inference; default: the contract's"
    )
    add("--num-steps", type=int, metavar="N", help="denoising steps; default: the bundle's")


def _add_safety(add: Callable[..., object], defaults: LoopOptions) -> None:
    add("--limits", metavar="FILE", help="limits of the commands in robot units; tightens those of the robot")
    add("--show-limits", action="store_true", help="print the limits and where they come from, and run nothing")
    add("--trip-after", type=int, metavar="N", help="stop after N violations of limits in a row; default: 1 s")
    add("--starve-limit", type=int, metavar="N", help="stop after N ticks without a fresh action; default: 2 s")
    add("--stale-after", type=float, default=defaults.stale_after, metavar="S", help="hold where readings are older")
    add("--stop-file", metavar="FILE", help="stop when this file appears")
    add("--stop-keys", action="store_true", help="stop at q or the space bar in the terminal")


def _add_engine(add: Callable[..., object]) -> None:
    add("--backend", default="auto", metavar="NAME", help=f"{', '.join(NAMES)}; default: the fastest one that can")
    add("--threads", type=int, metavar="N", help="CPU threads of the engine; default: its own choice")
    add("--trust-engines", action="store_true", help=TRUST_HELP)
    add("--verify", action="store_true", help="check the bundle's hashes before running")
    add(
        "--digest",
        metavar="HEX",
        help="run only the bundle with this digest, which its export printed; checks all hashes",
    )


if __name__ == "__main__":
    sys.exit(main())
