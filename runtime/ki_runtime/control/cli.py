"""ki-run: run a bundle on a robot."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from ki_edge.commands import run_command, show, show_json, tell
from ki_edge.errors import ArgumentError
from ki_runtime.recording.dataset import check_packages
from ki_runtime.robots import open_robot
from ki_runtime.robots.opening import check_known

from .blame import blamed
from .fit import is_paced
from .flags import build_parser
from .interrupts import Interrupts
from .limit_sources import limits_for
from .limits_table import limit_lines
from .loop import ControlLoop
from .options import LoopOptions
from .recorder import Recorder, check_folder
from .rerun_viewer import RerunViewer, check_rerun
from .self_check_file import check_enough, read_limit, save_limit
from .sources import check_source, contract_of, opened_policy
from .subtask import SubtasksTold, TwoLevels, Writing, writing_of
from .terminal import TerminalView

OWN = {"close_robot"}  # options of the loop that are no options of the command


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 for an error, which is one line on stderr; 128 + n after signal n (130 for Ctrl-C)."""
    options = build_parser().parse_args(arguments)
    return run_command("ki-run", lambda: _run(options), "nothing was run")


def _run(options: argparse.Namespace) -> int:
    loop_options, writing = _checked(options)
    if options.show_limits:
        return _show_limits(options)
    with opened_policy(options) as policy, Interrupts() as interrupts, interrupts.held(), ExitStack() as opened:
        view = TerminalView(options.episodes)
        levels = None if writing is None else TwoLevels(policy, writing, say=view.say)
        robot = open_robot(options.robot, **_robot_options(options))
        opened.callback(robot.close)
        loop = ControlLoop(levels or policy, robot, loop_options, interrupts=interrupts, say=view.say)
        with interrupts.released():
            _warm_up(options, policy, levels, loop)
        viewers = [] if options.rerun is None else [RerunViewer(options.rerun)]
        recorder = None
        if options.record:  # nothing was written before
            every = options.record_every_tick or options.delay is not None or not is_paced(loop_options, robot)
            recorder = Recorder(options.record, every_tick=every)
        told_subtasks = [] if levels is None else [SubtasksTold(view.say)]
        loop.watch(view, *told_subtasks, *([recorder] if recorder else []), *viewers)
        opened.pop_all()  # from here on the loop closes the robot
        return _drive(options, loop, levels, recorder)


def _checked(options: argparse.Namespace) -> tuple[LoopOptions, Writing | None]:
    """All that can be refused before a large model is loaded, and engines are built."""
    check_source(options)
    check_known(options.robot, options.robot_config)
    if options.record:
        check_folder(options.record)
        check_packages()
    if options.rerun is not None:
        check_rerun(options.rerun)
    if options.self_check_limit is not None:
        options.self_check_limit = read_limit(options.self_check_limit)
    if options.self_check_save is not None and options.self_check is None:
        raise ArgumentError("--self-check-save is of a self-check: say every how many seconds (--self-check)")
    if options.self_check_save is not None and not Path(options.self_check_save).absolute().parent.is_dir():
        raise ArgumentError(f"--self-check-save {options.self_check_save}: its folder does not exist")
    if options.self_check_save is not None and options.max_seconds is not None:
        check_enough(options.max_seconds / options.self_check)
    if options.record_every_tick and not options.record:
        raise ArgumentError("--record-every-tick is of a recording: say into which folder (--record DIR)")
    writing = writing_of(options.subtask_every, options.subtask_question)
    told = {one.name for one in fields(LoopOptions)} - OWN
    loop_options = LoopOptions(**{name: getattr(options, name) for name in told})
    if options.disturb is not None and not options.robot.startswith("gym:"):
        raise ArgumentError(f"--disturb moves the target of a simulated arm (gym:...); {options.robot} has none")
    return loop_options, writing


def _warm_up(options: argparse.Namespace, policy: Any, levels: TwoLevels | None, loop: ControlLoop) -> None:
    """All that happens at first use, before anything moves."""
    prepared = policy.warm_up(prompt=options.prompt, num_steps=options.num_steps, fast=loop.self_check is not None)
    if levels is not None:
        levels.warm_up_writing()
    loop.expect(prepared.inference_ms)
    seconds = prepared.milliseconds / 1e3
    tell(f"ki-run: warmed up in {seconds:.1f} s; an inference takes {prepared.inference_ms:.0f} ms")
    if (warning := loop.limits.warning()) is not None:
        tell(f"ki-run: {warning} (--limits FILE)")


def _drive(options: argparse.Namespace, loop: ControlLoop, levels: TwoLevels | None, recorder: Recorder | None) -> int:
    """Run, and print the report however it ends."""
    status = 0
    try:
        loop.run()
    except KeyboardInterrupt as stop:
        tell(f"ki-run: {stop or 'interrupted'}")
        status = 128 + int(getattr(stop, "signum", signal.SIGINT))
    except Exception as error:
        if loop.commands:
            with suppress(OSError):
                _print(options, loop, levels, recorder, interrupted=True)
        raise blamed(error, loop.robot) from error
    _print(options, loop, levels, recorder, interrupted=status != 0)
    if loop.self_check is not None and options.self_check_save is not None and status == 0:
        limit = save_limit(options.self_check_save, loop.self_check.disagreements())
        tell(f"ki-run: a disagreement of {limit:.3g} is the limit that {options.self_check_save} keeps")
    return status


def _robot_options(options: argparse.Namespace) -> dict[str, Any]:
    """What of the options goes to the robot."""
    given = {"config": options.robot_config, "disturb": options.disturb}
    return {name: value for name, value in given.items() if value is not None}


def _show_limits(options: argparse.Namespace) -> int:
    """The limits that a run would have, with their origin. The model is not opened, the robot does not move."""
    contract, stats = contract_of(options)
    robot = open_robot(options.robot, **_robot_options(options))
    try:
        limits = limits_for(contract, stats, robot, options.limits)
    finally:
        robot.close()
    show(limit_lines(limits))
    return 0


def _print(
    options: argparse.Namespace,
    loop: ControlLoop,
    levels: TwoLevels | None,
    recorder: Recorder | None,
    *,
    interrupted: bool,
) -> None:
    report = loop.report(interrupted=interrupted)
    if options.json:
        facts = {
            "bundle": options.bundle or options.policy,
            "robot": options.robot,
            "seed": options.seed,
            **report.to_json(),
        }
        facts |= {} if levels is None else {"subtasks": levels.summary()}
        show_json(facts)
        return
    lines = [*report.lines(), *(levels.lines() if levels else ()), *(recorder.notes if recorder else ())]
    if options.verbose:
        lines.append(f"torch loaded  {'yes' if 'torch' in sys.modules else 'no'}")
    if options.record:
        lines = [*lines, f"recorded      {options.record}"]
    elif options.robot.startswith("replay:"):
        lines = [*lines, "add --record DIR to plot the predicted actions against the recorded ones"]
    show(lines)


if __name__ == "__main__":
    sys.exit(main())
