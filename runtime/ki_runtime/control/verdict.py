"""What the guards say of an action, and how they react to each kind of violation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from ki_edge.errors import ArgumentError

F32 = npt.NDArray[np.float32]
Reaction = Literal["clamp", "hold", "stop"]
REACTIONS: Mapping[str, Reaction] = {
    "shape": "hold",
    "finite": "hold",
    "measured": "hold",
    "position": "clamp",
    "velocity": "clamp",
    "acceleration": "clamp",
    "step": "clamp",
    "gripper": "clamp",
    "user": "hold",
}
NO_CLAMP = ("shape", "finite", "measured", "user")  # there is nothing to clamp to


class Verdict(NamedTuple):
    """What to do with one action. `action` f32 [a] is what to send; None: nothing was sent yet that could be held.

    `kinds`: the rules that were broken, in the order of the checks; `note` says how in one line, "" where none was.
    `tripped`: nothing moves any more until a reset. `stop`: the robot's safe stop is called for.
    """

    action: F32 | None
    kinds: tuple[str, ...] = ()
    note: str = ""
    tripped: bool = False
    stop: bool = False


def reactions(on: Mapping[str, Reaction]) -> dict[str, Reaction]:
    """The reaction to every kind of violation: those of REACTIONS but for `on`. ArgumentError names what is wrong."""
    for kind, reaction in on.items():
        if kind not in REACTIONS:
            raise ArgumentError(f"reactions: no check is called {kind!r:.60}; they are {', '.join(REACTIONS)}")
        if reaction not in get_args(Reaction) or (reaction == "clamp" and kind in NO_CLAMP):
            allowed = [name for name in get_args(Reaction) if name != "clamp" or kind not in NO_CLAMP]
            raise ArgumentError(f"reaction to {kind}: {reaction!r:.60}: expected one of {', '.join(allowed)}")
    return {**REACTIONS, **on}
