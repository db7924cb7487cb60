"""Gymnasium environments by their id. Gymnasium is imported when the first of them is made."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import io
from collections.abc import Mapping
from typing import Any

from ki_edge.errors import RobotError

from .classes import import_module
from .rendering import choose_gl

NEAR = 5  # ids in a message


def make_environment(name: str, options: Mapping[str, Any]) -> Any:
    """gymnasium.make(name, **options), with the environments of Gymnasium-Robotics where that is installed.

    "module:ID" imports the module first, which registers the environment. RobotError names what is missing, or the ids
    that are most like `name`.
    """
    gymnasium = import_gymnasium()
    module, colon, _ = name.partition(":")
    if colon:
        import_module(module, f"environment {name!r:.80}")
    try:
        return gymnasium.make(name, disable_env_checker=True, **options)
    except gymnasium.error.UnregisteredEnv as error:
        raise RobotError(f"there is no environment {name!r:.80}: {_line(error)}; {_like(gymnasium, name)}") from None
    except ModuleNotFoundError as error:
        raise RobotError(f"environment {name!r:.80} needs {error.name}, which is not installed") from error
    except Exception as error:  # a simulator that does not fit fails in ways of its own
        cure = ": pip install 'ki-edge[sim]' brings what fits" if name.startswith("Fetch") else ""
        raise RobotError(f"environment {name!r:.80} cannot be made ({_line(error)}){cure}") from error


def import_gymnasium() -> Any:
    """Gymnasium, with the environments of Gymnasium-Robotics where that is installed. RobotError without it."""
    choose_gl()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # it prints notices about other environments
            import gymnasium

            with contextlib.suppress(ModuleNotFoundError):
                import gymnasium_robotics

                gymnasium.register_envs(gymnasium_robotics)
    except ModuleNotFoundError as error:
        raise RobotError(f"the simulated robot needs {error.name}: pip install 'ki-edge[sim]'") from error
    return gymnasium


def _like(gymnasium: Any, name: str) -> str:
    ids = [str(known) for known in gymnasium.registry]
    near = difflib.get_close_matches(name, ids, NEAR, 0.3) or sorted(ids)[:NEAR]
    found = f"of {len(ids)} that there are, the most alike: {', '.join(near)}"
    if importlib.util.find_spec("gymnasium_robotics") is None:
        return f"{found}; for those of Gymnasium-Robotics: pip install 'ki-edge[sim]'"
    return found


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")
