"""The ticks of an episode: one command each, and between two of them whatever else is to be done.

    wait for the tick -> take the answer of an inference, if one came -> the action that is due -> guards -> robot.act
    -> status -> observe and ask for the next chunk, if it is time to

Nothing in it waits for an inference, except where the robot shall (mode sync); whatever ends a run is heard then too.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.errors import BackendError, ObservationError, RobotError
from ki_edge.policy.chunking import PreviousChunk
from ki_edge.policy.keys import under_contract_keys
from ki_edge.policy.transforms import read_state
from ki_runtime.remote.policy import OUTDATED
from ki_runtime.robots.base import EpisodeStatus

from .inference import Request
from .parts import Parts
from .reporting import Step
from .schedule import Chunk, Planned

FIRST = 60.0  # seconds that the first chunk of an episode may take
LONGEST = 300.0  # seconds that a robot waits for an inference, in mode sync
DOUBTED = "doubted"  # of a result: the policy's heads disagree, nothing of it may be sent
PAUSE = 0.02  # seconds between two looks at what may end a run meanwhile


@dataclass(frozen=True)
class Counts:
    """What happened in an episode."""

    ticks: int
    inferences: int
    successes: tuple[bool | None, ...]
    failure: BaseException | None = None  # of the policy, whose last good chunk was enough for the episode


class Cycle:
    """One episode. `epoch` tells its inferences from those of the episodes before."""

    def __init__(self, parts: Parts, epoch: int, seed: int) -> None:
        self._parts, self._epoch, self._seed = parts, epoch, seed
        self._tick = self._asked = self._inferences = 0
        self._seen = -1  # the tick of the last observation
        self._starved = 0  # ticks in a row
        self._failure: BaseException | None = None  # of the policy: its last good chunk is played to its end
        self._refused: str | None = None  # why the last observation was of no use
        self._doubt: str | None = None  # why the last chunk was
        self._late: str | None = None  # why it came too late
        self._observe_ms = 0.0
        self._commands = 0  # ticks that had one; those in which the robot waits for its first chunk have none
        self._moved = False  # whether any command was sent
        self._state: npt.NDArray[np.float64] | None = None

    def run(self) -> Counts:
        """Ticks until the episode is over. Errors of robot, policy and guards come out."""
        parts = self._parts
        parts.schedule.reset()
        parts.seams.reset()
        parts.watchdog.reset()
        parts.guards.reset(None)
        if parts.self_check is not None:
            parts.self_check.reset(self._epoch)
        status = parts.robot.status()
        successes = [status.success]
        self._begun = parts.clock.now()
        if not self._over(status):
            self._ask()
            self._look_on()
        parts.ticker.restart()
        while not self._over(status):
            if self._act():
                self._commands += 1
                status = parts.robot.status()
                successes.append(status.success)
            self._tick += 1
            if not self._over(status):
                self._receive()  # before the next tick: so that a question goes out with the answer to the last one
                self._ask()
                self._look_on()
        return Counts(self._tick, self._inferences, tuple(successes), self._failure)

    def _over(self, status: EpisodeStatus) -> bool:
        limit = self._parts.options.max_steps
        return status.done or (limit is not None and self._commands >= limit)

    # ------------------------------------------------------------------ one tick

    def _act(self) -> bool:
        """Wait for the tick and send its command. False if there was none to send yet."""
        parts = self._parts
        with parts.interrupts.released():
            parts.ticker.wait()
        parts.stops.check()
        self._receive()
        if parts.is_old(parts.schedule.observed):
            parts.schedule.drop()
        self._hear_self_check()
        planned = parts.schedule.take()
        if planned is None and not self._starve():
            return False
        self._send(planned)
        return True

    def _hear_self_check(self) -> None:
        """What the policy found about itself. In doubt nothing that is planned is sent."""
        check = self._parts.self_check
        if check is None:
            return
        for found in check.take():
            self._parts.reporter.tell(lambda watcher, found=found: watcher.checked(found))  # type: ignore[misc]
        if check.doubtful:
            self._parts.schedule.drop()
            self._doubt = check.hold()
        else:
            self._doubt = None

    def _starve(self) -> bool:
        """Nothing is planned. Whether to hold; raises when it has gone on for too long."""
        parts = self._parts
        if self._failure is not None:
            raise self._failure
        why = self._refused or self._doubt or self._late
        reason = f" ({why})" if why else ""
        if not self._moved:
            if parts.clock.now() - self._begun > FIRST:
                raise RobotError(f"the first chunk of actions did not come within {FIRST:g} s{reason}")
            return False
        self._starved += 1
        if not (parts.waits and parts.inference.busy):  # a robot that waits for an inference lacks nothing
            parts.starved += 1
            if self._starved > parts.starve_limit:
                raise RobotError(
                    f"no fresh action for {self._starved - 1} ticks{reason}: {parts.robot.name} is stopped"
                )
        return True

    def _send(self, planned: Planned | None) -> None:
        """Command the robot: the planned action as the guards let it through, or what it got last."""
        parts = self._parts
        measured = self._measure()
        if measured is None and not self._moved:
            measured = self._state  # of the last observation: the robot stands still since
        kinds: tuple[str, ...] = ()
        if planned is None:
            action = parts.guards.held()
        else:
            self._starved = 0
            verdict = parts.guards.admit(planned.action, dt=parts.ticker.period, measured=measured)
            action, kinds = verdict.action, verdict.kinds
            if verdict.tripped or verdict.stop:
                raise RobotError(f"the guards stop {parts.robot.name}: {verdict.note}")
        if action is None:  # refused, and nothing was ever sent that could be held
            return
        if planned is None and parts.hold is not None:
            parts.hold()
        else:
            start = time.perf_counter()
            parts.robot.act(action)
            parts.latencies.add({"act_ms": 1e3 * (time.perf_counter() - start)})
        self._moved = True
        self._tell(planned, action, kinds, measured)

    def _tell(
        self,
        planned: Planned | None,
        action: npt.NDArray[np.float32],
        kinds: tuple[str, ...],
        measured: npt.NDArray[np.float64] | None,
    ) -> None:
        parts, now = self._parts, self._parts.clock.now()
        seam = parts.seams.add(action, None if planned is None else planned.chunk)
        if planned is None:
            step = Step(self._tick, action, seam=seam)
        else:
            age = now - planned.observed
            step = Step(self._tick, action, planned.action, planned.chunk, planned.index, age, seam, kinds)
        step = replace(step, time=now - self._begun, measured=measured if parts.measure is not None else None)
        parts.commands += 1
        parts.reporter.tell(lambda watcher: watcher.stepped(step))
        parts.film()

    # ------------------------------------------------------------------ inferences

    def _ask(self) -> None:
        """Observe and start the next inference, if it is time to."""
        parts = self._parts
        parts.reporter.check()
        if parts.inference.busy or self._failure is not None:
            return
        delay = parts.delays.predict()
        if parts.schedule.left and (parts.waits or parts.schedule.index < parts.before_next(delay)):
            return
        start = time.perf_counter_ns()
        observed = parts.clock.now()
        observation = self._observe()
        observe_ms = (time.perf_counter_ns() - start) / 1e6
        parts.tell_observed(self._tick, observation)
        self._seen = self._tick
        refused, self._refused = self._refused, self._look(observation)
        if self._refused is not None:
            if refused is None:
                parts.reporter.say(f"{self._refused}: nothing is computed from it, {parts.robot.name} will hold")
            return
        # those that will be sent before the next chunk but one is there: what comes later shall not pull
        rest = parts.schedule.rest()[: delay + parts.execute]
        told = parts.options.mode == "rtc" and len(rest)
        previous = PreviousChunk(rest.astype(np.float64), min(delay, len(rest))) if told else None
        noise = parts.noise(self._seed, self._asked)
        request = Request(
            self._epoch, self._asked, self._tick, parts.schedule.step, observation, observed, noise, previous, delay,
            first=not self._moved,
        )  # fmt: skip
        self._asked += 1
        self._observe_ms = observe_ms
        if parts.waits and parts.goes_on and self._moved:
            self._stand()
        with parts.interrupts.released():
            parts.inference.submit(request)
            if parts.waits:
                self._wait()
        if parts.waits:
            parts.ticker.restart()

    def _stand(self) -> None:
        """Before a wait, where a command is a motion that would go on blindly through it."""
        still = self._parts.guards.held()
        if still is not None:
            self._parts.robot.act(still)

    def _wait(self) -> None:
        """Until the inference has answered. RobotError if it never does."""
        parts, begun = self._parts, time.monotonic()
        while not parts.inference.wait(PAUSE):
            parts.stops.check()
            if time.monotonic() - begun > LONGEST:
                raise RobotError(f"an inference has not answered within {LONGEST:g} s: {parts.robot.name} is stopped")

    def _receive(self) -> None:
        """If an inference answered: its chunk is played from the row that is due."""
        parts = self._parts
        answer = parts.inference.poll(self._tick, self._epoch)
        if answer is None:
            return
        request = answer.request
        if answer.error is not None:
            self._failure = answer.error
            return
        answered: Any = answer.result  # also None, of a policy that answers nothing
        try:
            actions = parts.guard.admit(answered)
        except BackendError as error:
            self._failure = error
            return
        timing = {"observe_ms": self._observe_ms, **(answered.get("timing") or {})}
        parts.latencies.add(timing)
        result = {**answered, "timing": timing}
        parts.reporter.tell(lambda watcher: watcher.inferred(request.tick, request.observation, result))
        self._inferences += 1
        way = parts.way(request) if request.previous is not None else "plain"
        parts.ways.add(way)
        chunk = Chunk(request.number, actions, request.step, request.observed, way)
        if answered.get(DOUBTED):
            pass
        elif parts.is_old(request.observed) or answered.get(OUTDATED):
            parts.late += 1
            self._tell_late(parts.clock.now() - request.observed)
        elif parts.schedule.hand_over(chunk):
            self._late = None
        else:
            parts.late += 1
        if not request.first:
            parts.delays.add(request.delay, parts.schedule.step - request.step, self._tick - request.tick)

    def _tell_late(self, age: float) -> None:
        late, oldest = self._late, self._parts.oldest
        self._late = f"a chunk came {age:.1f} s after its observation and was dropped, as all after {oldest:.1f} s"
        if self._parts.waits:
            self._late = f"a chunk came {age:.1f} s after its observation, from a server that was away, and was dropped"
        if late is None:
            self._parts.reporter.say(f"{self._late}: {self._parts.robot.name} will hold")

    # ------------------------------------------------------------------ what the robot tells

    def _look_on(self) -> None:
        """An observation of this tick for those who want one of every tick, where none was made for the policy."""
        if self._parts.observers and self._seen != self._tick:
            self._parts.tell_observed(self._tick, self._observe())
            self._seen = self._tick

    def _observe(self) -> Mapping[str, Any]:
        parts = self._parts
        observation: Mapping[str, Any] = parts.robot.observe()
        if isinstance(observation, Mapping):
            with suppress(ObservationError):  # one thing under two keys: the policy says so, if it minds
                observation = under_contract_keys(parts.contract, observation)
        if parts.reads_on:  # the robot may use its memory again meanwhile
            observation = copy.deepcopy(dict(observation))
        if parts.options.prompt is not None:
            observation = {**observation, "prompt": parts.options.prompt}
        return observation

    def _look(self, observation: Mapping[str, Any]) -> str | None:
        """Why an observation cannot be used; None if it can."""
        parts = self._parts
        try:
            self._state = read_state(parts.contract, observation)
        except Exception:
            return None  # the policy says what is wrong with it
        times = parts.timestamps() if parts.timestamps is not None else {}
        return parts.watchdog.look(observation, self._state, times, time.monotonic())

    def _measure(self) -> npt.NDArray[np.float64] | None:
        """The state now, as far as the robot tells it without pictures; that of an observation is too old for it."""
        parts = self._parts
        return None if parts.measure is None else np.asarray(parts.measure(), np.float64)
