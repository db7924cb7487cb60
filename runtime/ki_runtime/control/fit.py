"""Whether a policy, a robot and the options of a loop fit each other, and what follows from them."""

from __future__ import annotations

from typing import Any

from ki_edge.errors import ArgumentError, RobotError
from ki_edge.policy.contract import PolicyContract
from ki_runtime.robots.base import Robot
from ki_runtime.robots.protocol import check_robot

from .options import FASTEST, SLOWEST, LoopOptions
from .schedule import Way

NEAR = 0.01  # two rates that differ by less are one


def control_rate(options: LoopOptions, contract: PolicyContract, robot: Robot) -> float:
    """Ticks a second. RobotError if contract and robot disagree, or nobody knows."""
    trained, own = contract.control_hz, getattr(robot, "control_hz", None)
    if options.rate is not None:
        return float(options.rate)
    if trained is None and own is None:
        raise RobotError(
            f"neither the policy's contract nor {robot.name} says how many actions a second there are: give the rate"
        )
    if own is not None and not (isinstance(own, int | float) and SLOWEST <= own <= FASTEST):
        raise RobotError(
            f"{robot.name} says that it takes {own!r:.60} actions a second: expected a number from {SLOWEST:g} to "
            f"{FASTEST:g}; give the rate (--rate HZ)"
        )
    real = getattr(robot, "real_time", True)
    if real and trained is not None and own is not None and abs(trained - own) > NEAR * max(trained, own):
        raise RobotError(
            f"the policy was trained at {trained:g} actions a second, and {robot.name} runs at {own:g}: give the rate "
            "that is right (--rate HZ)"
        )
    return float(trained if trained is not None else own)  # type: ignore[arg-type]


def check_actions(robot: Robot, contract: PolicyContract) -> None:
    """RobotError for an object that is no robot, or for one that is commanded otherwise than the policy commands."""
    check_robot(robot)
    taken, given = getattr(robot, "action_names", None), contract.action_names
    if taken is not None and given is not None and tuple(taken) != tuple(given):
        raise RobotError(
            f"{robot.name} is commanded by ({', '.join(taken)}), but the policy gives ({', '.join(given)}): "
            "use a policy trained for this robot"
        )


def is_paced(options: LoopOptions, robot: Robot) -> bool:
    """Whether the loop keeps to a rate. A robot whose time does not pass by itself needs none."""
    real = getattr(robot, "real_time", True)
    if not real and options.mode != "sync" and options.delay is None:
        raise ArgumentError(f"mode {options.mode}: no time passes for {robot.name} by itself: give a delay (--delay N)")
    if real and not options.paced and not getattr(robot, "simulated", False):
        raise ArgumentError(
            f"unpaced: {robot.name} does not say that it is simulated, and limits per second hold for actions at its "
            "rate: leave --unpaced out (a simulated robot has `simulated = True`)"
        )
    return options.paced and real


def actions_to_execute(options: LoopOptions, contract: PolicyContract) -> int:
    execute = options.execute or contract.execute
    if execute > contract.action_horizon:
        raise ArgumentError(
            f"execute must be at most {contract.action_horizon}, the actions that the policy gives at once; "
            f"got {execute}"
        )
    return execute


def most_delay(contract: PolicyContract) -> int:
    """Actions that an inference may take: a chunk must last through its own and through the next."""
    return contract.action_horizon // 2


def given_delay(options: LoopOptions, contract: PolicyContract) -> int:
    """Actions that an inference takes, where that is given."""
    delay, horizon = options.delay or 0, contract.action_horizon
    if options.mode != "sync" and delay > most_delay(contract):
        raise ArgumentError(
            f"delay {delay}: the policy gives {horizon} actions at once, of which {delay} pass during an inference and "
            f"{delay} more during the next; at most {most_delay(contract)} can be bridged: use mode sync, or "
            "a policy with a longer horizon"
        )
    return delay


def way_to_join(options: LoopOptions, policy: Any) -> Way:
    if options.mode != "rtc":
        return "plain"
    way, most = getattr(policy, "rtc", None), getattr(policy, "max_delay", None)
    if way is None:
        of_bundles = (
            "this bundle was exported without real-time chunking: export it again with --rtc, or use mode async"
        )
        raise ArgumentError(f"mode rtc: {why}" if (why := getattr(policy, "without_rtc", None)) else of_bundles)
    if most is not None and (options.delay or 0) > most:
        raise ArgumentError(
            f"delay {options.delay}: this policy was trained for delays of at most {most} actions: use mode async"
        )
    known: Way = way
    return known
