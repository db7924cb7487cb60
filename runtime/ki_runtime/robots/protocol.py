"""Whether an object is a robot: one look at all that a control loop will call, before it calls anything."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from ki_edge.errors import RobotError

PAGE = "docs/robots.md has the table of what a robot has"
# What a loop calls -> the arguments with which it does.
NEEDED: Mapping[str, tuple[str, ...]] = {
    "reset": ("seed",),
    "observe": (),
    "act": ("action",),
    "status": (),
    "frame": (),
    "close": (),
}
OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "measure": (),
    "timestamps": (),
    "hold": (),
    "safe_stop": (),
    "fit": ("contract",),
    "check": ("action", "state"),
}


def check_robot(robot: Any, called: str | None = None) -> None:
    """RobotError lists everything that `robot` lacks of the protocol (`ki_runtime.robots.base.Robot`), and what of it
    is of another kind. `called`: what the message calls it; None: its type.
    """
    if inspect.isclass(robot):
        raise RobotError(f"the robot is the class {robot.__name__}: give an object of it, {robot.__name__}(...)")
    faults = [*_attribute_faults(robot), *_method_faults(robot)]
    if faults:
        raise RobotError(f"{called or type(robot).__name__} is no robot yet: {'; '.join(faults)}. {PAGE}")


def _attribute_faults(robot: Any) -> list[str]:
    faults = []
    missing = object()
    name = getattr(robot, "name", missing)
    if not isinstance(name, str) or not name:
        faults.append(f"name is {'missing' if name is missing else repr(name)[:60]}, expected text")
    rate = getattr(robot, "control_hz", None)  # the loop says so where nobody tells a rate
    if rate is not None and (not isinstance(rate, int | float) or isinstance(rate, bool)):
        faults.append(f"control_hz is {rate!r:.60}, expected a number or None")
    names = getattr(robot, "action_names", None)
    if names is not None and not _are_names(names):
        faults.append(f"action_names is {names!r:.60}, expected a tuple of texts")
    for flag in ("real_time", "simulated"):
        value = getattr(robot, flag, False)
        if not isinstance(value, bool):
            faults.append(f"{flag} is {value!r:.60}, expected True or False")
    return faults


def _are_names(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(name, str) for name in value)


def _method_faults(robot: Any) -> list[str]:
    absent = [name for name in NEEDED if getattr(robot, name, None) is None]
    faults = [f"it has no {', '.join(_call(name, NEEDED[name]) for name in absent)}"] if absent else []
    for name, arguments in {**NEEDED, **OPTIONAL}.items():
        method = getattr(robot, name, None)
        if method is None:
            continue
        if not callable(method):
            faults.append(f"{name} is {method!r:.60}, expected a method {_call(name, arguments)}")
        elif inspect.iscoroutinefunction(method) or inspect.isgeneratorfunction(method):
            faults.append(f"{name} is a coroutine or generator, expected a plain method {_call(name, arguments)}")
        elif not _takes(method, len(arguments)):
            own = ", ".join(inspect.signature(method).parameters)
            faults.append(f"{name}({own}) cannot be called as {_call(name, arguments)}")
    return faults


def _takes(method: Any, count: int) -> bool:
    """Whether it can be called with so many arguments in order; what cannot be known counts as yes."""
    try:
        signature = inspect.signature(method)
    except (ValueError, TypeError):
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def _call(name: str, arguments: tuple[str, ...]) -> str:
    return f"{name}({', '.join(arguments)})"
