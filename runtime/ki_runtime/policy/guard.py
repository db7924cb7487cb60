"""The last look at a chunk of actions before a robot gets the first of them.

Everything is checked in the numbers that are really sent: float32, after the last cast. What is refused, is refused
whole. What limits a single command stands in `ki_runtime.control.guards`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.errors import BackendError
from ki_edge.policy.contract import PolicyContract

F32 = npt.NDArray[np.float32]
NOTHING = "nothing of this chunk is sent to the robot"
CURE = "check the bundle with ki-parity; a low precision may overflow"


class Guard:
    """Admits chunks of one policy. `least`: actions that a chunk must have, those that will be executed."""

    def __init__(self, contract: PolicyContract, least: int) -> None:
        self._size, self._least, self._names = contract.action_dim, least, contract.action_names

    def admit(self, result: Mapping[str, Any]) -> F32:
        """The actions f32 [n, a] of what a policy answered, robot units. BackendError if they cannot be sent."""
        if not isinstance(result, Mapping) or "actions" not in result:
            answer = sorted(map(str, result)) if isinstance(result, Mapping) else type(result).__name__
            raise BackendError(f"the policy answered {answer}, expected a mapping with 'actions'; {NOTHING}")
        given = _numbers(result["actions"])
        if given.ndim != 2 or given.shape[1] != self._size or len(given) < self._least:
            raise BackendError(
                f"the policy gave actions of shape {given.shape}, expected [n, {self._size}] with at least "
                f"{self._least} actions; {NOTHING}"
            )
        return finite_actions(given, self._names)


def finite_actions(given: npt.NDArray[Any], names: tuple[str, ...] | None = None) -> F32:
    """`given` [n, a] as f32. BackendError names step and dimension of the first value that is not finite there."""
    with np.errstate(over="ignore", invalid="ignore"):
        actions = np.array(given, np.float32)
    bad = np.argwhere(~np.isfinite(actions))
    if len(bad):
        step, dim = (int(i) for i in bad[0])
        name = f" ({names[dim]})" if names is not None and dim < len(names) else ""
        value = given[step, dim]
        what = "too large for float32" if np.isfinite(value) else "not finite"
        raise BackendError(
            f"the policy gave {len(bad)} of {actions.size} actions that cannot be sent, the first at step {step} of "
            f"the chunk, dimension {dim}{name}: {value:.6g} is {what}; {NOTHING}: {CURE}"
        )
    return actions


def _numbers(actions: object) -> npt.NDArray[Any]:
    try:
        given = np.asarray(actions)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged lists; tensors on a device
        raise BackendError(f"the policy's actions are not an array of numbers ({error}); {NOTHING}") from None
    if given.dtype.kind not in "fiu":
        raise BackendError(f"the policy's actions are an array of {given.dtype}, expected floating point; {NOTHING}")
    return given
