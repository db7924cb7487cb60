"""A policy checks itself: its two heads look at the same observation, and should want the same.

A policy with knowledge insulation says its actions twice, by flow matching and in FAST tokens. Where both know what
they see they agree; what they were never trained for they answer differently. In the spare time of the thread that
infers, the tokens of an observation are decoded and compared with the chunk that was computed from it. A check that is
not done when the next inference is asked for is given up, between two steps of it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ki_edge.errors import ArgumentError, KiEdgeError
from ki_runtime.policy.agreement import Agreement

from .inference import Request
from .telemetry import percentiles

MOST = 100_000  # disagreements that are kept for the report


@dataclass(frozen=True)
class Checked:
    """A check: `number` and `tick` are those of the inference whose chunk was compared.

    `disagreement`: see `Agreement`; infinite where the tokens were no chunk of actions, `problem` says why. `beyond`:
    more than the limit. `milliseconds`: what it took.
    """

    number: int
    tick: int
    disagreement: float
    beyond: bool
    milliseconds: float
    problem: str | None = None


class SelfCheck:
    """Checks every `every` seconds of the loop's clock. `limit`: the robot holds beyond it; None: it is only told.

    ArgumentError for a policy that has no second head.
    """

    def __init__(self, policy: Any, every: float, limit: float | None = None) -> None:
        contract = policy.contract
        if not hasattr(policy, "infer_fast") or getattr(contract, "fast", None) is None:
            raise ArgumentError(
                "a self-check compares the two heads of a policy, and this one has no FAST head: export its checkpoint "
                "with one (--fast-head), or leave the check out"
            )
        self._agreement = Agreement(getattr(policy, "stats", None) or {}, contract.action_dim)
        self._policy, self._every, self.limit = policy, every, limit
        self._epoch = 0
        self._last: float | None = None  # observation of the last check that was done
        self._new: deque[Checked] = deque()
        self._found: list[float] = []
        self._took: list[float] = []
        self._beyond = self._given_up = self._held = 0
        self.doubtful = False  # the last check was beyond the limit: nothing is sent until one is not

    # ------------------------------------------------------------------ in the thread that infers

    def before_answering(self, request: Request, result: Mapping[str, Any]) -> bool:
        """Whether a chunk must not be sent. With a limit an episode's first one is checked, and all while in doubt."""
        if self.limit is not None and (self.doubtful or request.first):
            self._check(request, result, lambda: False)
        return self.doubtful

    def when_idle(self, request: Request, result: Mapping[str, Any], wanted: Callable[[], bool]) -> None:
        """A check, if it is time for one. `wanted`: whether the thread is, for the next inference."""
        if not self.doubtful and (self._last is None or request.observed - self._last >= self._every):
            self._check(request, result, wanted)

    def _check(self, request: Request, result: Mapping[str, Any], wanted: Callable[[], bool]) -> None:
        start = time.perf_counter()
        try:
            fast = self._policy.infer_fast(request.observation, stop=wanted)
            actions, problem = fast["actions"], fast["problem"]
        except KiEdgeError as error:
            actions, problem = None, str(error)
        took = 1e3 * (time.perf_counter() - start)
        self._took.append(took)
        if request.epoch != self._epoch or (actions is None and wanted()):
            self._given_up += 1
            return
        self._last = request.observed
        given = request.delay if request.previous is not None else 0  # those continue the chunk before
        apart = float("inf")
        if actions is not None:
            apart = self._agreement.disagreement(result["actions"][given:], actions[given:])
        beyond = self.limit is not None and apart > self.limit
        if len(self._found) < MOST:
            self._found.append(apart)
        self._beyond += beyond
        self.doubtful = beyond
        self._new.append(Checked(request.number, request.tick, apart, beyond, took, problem))

    # ------------------------------------------------------------------ in the control thread

    def reset(self, epoch: int) -> None:
        """An episode begins. What is found of those before it counts no more."""
        self._epoch, self.doubtful, self._last = epoch, False, None

    def take(self) -> list[Checked]:
        """What was found since the last call."""
        return [self._new.popleft() for _ in range(len(self._new))]

    def hold(self) -> str:
        """Why the robot holds; counts a tick of it."""
        self._held += 1
        return "the two heads of the policy want different things of what they see"

    def disagreements(self) -> list[float]:
        """All that were found, in their order; infinite where the tokens were no actions."""
        return list(self._found)

    def summary(self, seconds: float) -> dict[str, Any]:
        """For the report of a run that took so many seconds."""
        finite = [value for value in self._found if value != float("inf")]
        return {
            "count": len(self._found),
            "given_up": self._given_up,
            "no_actions": len(self._found) - len(finite),
            "disagreement": percentiles(finite, 50, 95, 99, 100),
            "limit": self.limit,
            "beyond": self._beyond,
            "held": self._held,
            "milliseconds": percentiles(self._took, 50, 95),
            "share_of_time": 1e-3 * sum(self._took) / seconds if seconds > 0 else None,
        }
