"""Robots of other people: classes that an installed package offers, or of a module that is named.

[project.entry-points."ki_edge.robots"]     of a package's pyproject.toml
my-arm = "my_package.arm:MyArm"             --robot my-arm, --robot my-arm:ARG

--robot my_module:MyArm, --robot my_module:MyArm:ARG     from an installed module or one in the current folder
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from ki_edge.errors import KiEdgeError, RobotError

GROUP = "ki_edge.robots"
DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


class NoModule(RobotError):
    """There is no module of that name."""


def offered() -> dict[str, list[EntryPoint]]:
    """The robots that installed packages offer, by name; more than one where packages contend for a name."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        same = found.setdefault(point.name, [])
        if point.value not in [other.value for other in same]:  # a package that two folders of the path have
            same.append(point)
    return dict(sorted(found.items()))


def load_offered(name: str, points: list[EntryPoint]) -> Any:
    """What an entry point names. RobotError if two packages offer it, or it cannot be imported."""
    if len(points) > 1:
        packages = " and ".join(f"{package_of(point)} ({point.value})" for point in points)
        raise RobotError(f"robot {name!r} is offered by {packages}: uninstall one, or name the class, MODULE:CLASS")
    module, _, attribute = points[0].value.partition(":")
    return load_class(module.strip(), attribute.partition("[")[0].strip(), f"robot {name!r} of {package_of(points[0])}")


def package_of(point: EntryPoint) -> str:
    """The name of the package that an entry point belongs to."""
    return "an unnamed package" if point.dist is None else str(point.dist.name)


def load_class(module: str, attribute: str, what: str) -> Any:
    """`attribute` ("Class" or "Outer.Class") of `module`, which may also lie in the current folder.

    RobotError, which begins with `what`, if there is no such module or class, or the import fails.
    """
    if not DOTTED.fullmatch(module) or not DOTTED.fullmatch(attribute):
        raise RobotError(f"{what}: {module}:{attribute} does not name a class, as my_module:MyArm does")
    loaded = import_module(module, what)
    found: Any = loaded
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise RobotError(f"{what}: {_place(loaded)} has no {attribute}; it has {_classes(loaded)}")
        found = getattr(found, name)
    if not callable(found):
        raise RobotError(f"{what}: {module}:{attribute} is {type(found).__name__}, expected a class")
    return found


def import_module(module: str, what: str) -> Any:
    """A module, also of the current folder. RobotError, which begins with `what`, if it cannot be imported."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does: a command's own path begins with the folder of the command
        importlib.invalidate_caches()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if module == missing or module.startswith(missing + "."):
            raise NoModule(
                f"{what}: there is no module {missing}, neither installed ({sys.executable}) nor in {here}"
            ) from None
        raise RobotError(f"{what}: {module} needs {missing}, which is not installed ({sys.executable})") from error
    except KiEdgeError:
        raise
    except Exception as error:  # whatever a module does when it is imported
        raise RobotError(f"{what}: {module} cannot be imported: {_reason(error)}") from error


def construct(make: Callable[..., Any], arguments: tuple[Any, ...], options: Mapping[str, Any], what: str) -> Any:
    """make(*arguments, **options). RobotError, which begins with `what`, if it takes no such arguments or fails."""
    try:
        signature = inspect.signature(make)
    except (ValueError, TypeError):
        signature = None
    if signature is not None:
        try:
            signature.bind(*arguments, **options)
        except TypeError as error:
            given = ", ".join([*(f"{value!r:.60}" for value in arguments), *(f"{name}=..." for name in options)])
            raise RobotError(
                f"{what}: it is made as {make.__name__}{signature}, and cannot be as ({given}): {error}"
            ) from None
    try:
        return make(*arguments, **options)
    except KiEdgeError:
        raise
    except Exception as error:  # of hardware that is not there, and everything else
        raise RobotError(f"{what} cannot be opened: {_reason(error)}") from error


def _classes(module: Any) -> str:
    found = [name for name, value in vars(module).items() if inspect.isclass(value) and not name.startswith("_")]
    return ", ".join(sorted(found)[:20]) or "no class"


def _place(module: Any) -> str:
    return str(getattr(module, "__file__", None) or module.__name__)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": ")
