"""The two levels of π0.5: in spare time the policy writes what is to be done next, which then prompts its actions.

The high level reads the pictures and the task, and answers in words: the next subtask. The low level acts on it: its
prompt is the subtask instead of the task. Until the first one is written it acts on the task, and while one is written
on the one before. Writing is given up, between two steps of it, when the next inference is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np

from ki_edge.commands import tell
from ki_edge.errors import ArgumentError, KiEdgeError, PromptError
from ki_edge.policy.contract import PolicyContract
from ki_edge.policy.keys import FLAT_ROBOTS
from ki_edge.policy.transforms import read_prompt
from ki_runtime.robots.base import Robot

from .inference import Request
from .reporting import Watcher
from .telemetry import percentiles

TASK = "{task}"
MOST_TOKENS = 32


@dataclass(frozen=True)
class Writing:
    """How subtasks are written: every `every` seconds of the loop's clock, asked by `question`, of so many tokens.

    "{task}" in the question is the task, the prompt of the observation. ArgumentError for other than that.
    """

    every: float
    question: str = TASK
    max_tokens: int = MOST_TOKENS

    def __post_init__(self) -> None:
        number = isinstance(self.every, int | float) and not isinstance(self.every, bool)
        if not number or not 0.0 <= self.every <= 1e6:
            raise ArgumentError(f"subtask every {self.every!r:.40} seconds: expected a number from 0 to 1e6")
        if not isinstance(self.question, str) or not self.question.strip():
            raise ArgumentError(f"subtask question {self.question!r:.40}: expected text, such as {TASK!r}")


def writing_of(every: float | None, question: str | None) -> Writing | None:
    """Of the options of ki-run; None without subtasks. ArgumentError for a question without them."""
    if every is not None:
        return Writing(every, TASK if question is None else question)
    if question is not None:
        raise ArgumentError("--subtask-question is of subtasks: say every how many seconds (--subtask-every)")
    return None


class TwoLevels:
    """A policy whose prompt is the last subtask that it wrote. All else is the policy's own.

    What it acts on stands in each result under "subtask", None while it is the task. ArgumentError for a policy that
    cannot write: it needs a bundle with the whole vocabulary.
    """

    def __init__(self, policy: Any, writing: Writing, say: Callable[[str], object] = tell) -> None:
        if not hasattr(policy, "infer_text"):
            raise ArgumentError(f"subtasks: a {type(policy).__name__} does not answer in words")
        policy.check_text()
        self._policy, self._writing, self._say = policy, writing, say
        self._lock = Lock()  # a subtask is written in one thread, and an episode begins in another
        self._epoch = self._asked_in = 0  # now, and when the last inference began
        self._last: float | None = None  # observation of the last subtask
        self.subtask: str | None = None
        self._written = self._changes = self._given_up = self._unusable = 0
        self._took: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    @property
    def contract(self) -> PolicyContract:
        """The policy's own."""
        contract: PolicyContract = self._policy.contract
        return contract

    def infer(self, observation: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """As of the policy, prompted by the subtask."""
        with self._lock:
            subtask, self._asked_in = self.subtask, self._epoch
        return {**self._policy.infer(_prompted(observation, subtask), **more), "subtask": subtask}

    def infer_fast(self, observation: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """As of the policy, prompted by the subtask."""
        found: dict[str, Any] = self._policy.infer_fast(_prompted(observation, self.subtask), **more)
        return found

    def warm_up_writing(self) -> None:
        """Open, prove and try what writes, so that the first subtask is as fast as the others."""
        height, width = self.contract.image_size
        grey = np.full((height, width, 3), 128, np.uint8)
        images = {camera.key: grey for camera in self.contract.cameras if camera.key is not None}
        observation = images if self.contract.robot in FLAT_ROBOTS else {"images": images}
        self._policy.infer_text(observation, prompt=self._writing.question, max_tokens=2)

    def reset(self) -> None:
        """An episode begins: it acts on the task again."""
        with self._lock:
            self._epoch += 1
            self.subtask, self._last = None, None

    def when_idle(self, request: Request, result: Mapping[str, Any], wanted: Callable[[], bool]) -> None:
        """Write the next subtask, if it is time. `wanted`: whether the thread is, for the next inference."""
        with self._lock:
            epoch, last = self._asked_in, self._last
            over = epoch != self._epoch  # an inference of an episode that ended meanwhile: so is its picture
        if over:
            return
        if last is not None and request.observed - last < self._writing.every:
            return
        start = time.perf_counter()
        try:
            text, finished = self._write(request.observation, wanted)
        except KiEdgeError as error:
            self._refuse(str(error))
            return
        self._took.append(1e3 * (time.perf_counter() - start))
        if not finished and wanted():
            self._given_up += 1
            return
        with self._lock:
            if epoch != self._epoch:  # of an episode that is over
                return
            self._last = request.observed
            self._written += 1
            if (fault := self._fault(text, finished)) is not None:
                self._refuse(fault)
            elif text != self.subtask:
                self.subtask = text
                self._changes += 1

    def summary(self) -> dict[str, Any]:
        """For the report: how often a subtask was written, changed, given up for want of time, or was of no use."""
        return {
            "written": self._written,
            "changed": self._changes,
            "given_up": self._given_up,
            "unusable": self._unusable,
            "milliseconds": percentiles(self._took, 50, 95),
        }

    def lines(self) -> list[str]:
        """The same for people."""
        counts = (
            f"{self._written} written, {self._changes} changed, {self._given_up} given up, {self._unusable} unusable"
        )
        took = f", {np.median(self._took):.0f} ms each" if self._took else ""
        return [f"subtasks      {counts}{took}"]

    def _write(self, observation: Mapping[str, Any], wanted: Callable[[], bool]) -> tuple[str, bool]:
        question = self._writing.question
        if TASK in question:
            question = question.replace(TASK, read_prompt(self.contract, observation))
        found = self._policy.infer_text(observation, prompt=question, max_tokens=self._writing.max_tokens, stop=wanted)
        return found["text"], found["finished"]

    def _fault(self, text: str, finished: bool) -> str | None:
        """Why a text can be no prompt; None if it can."""
        if not text:
            return "it is empty"
        if not finished:
            return f"it does not end within {self._writing.max_tokens} tokens: {text!r:.60}"
        try:
            self._policy.tokenizer.encode(text, np.ones(self.contract.state_dim))  # the longest that states can be
        except PromptError as error:
            return str(error)
        return None

    def _refuse(self, why: str) -> None:
        """Go on with the last subtask; said once."""
        if not self._unusable:
            self._say(f"a subtask is of no use, the policy goes on with the last one: {why}")
        self._unusable += 1


class SubtasksTold(Watcher):
    """Says each subtask when the policy begins to act on it."""

    def __init__(self, say: Callable[[str], object] = tell) -> None:
        self._say = say
        self._last: str | None = None

    def episode_started(self, index: int, seed: int, robot: Robot) -> None:
        self._last = None

    def inferred(self, step: int, observation: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        subtask = result.get("subtask")
        if subtask != self._last:
            self._last = subtask
            self._say(f"tick {step}: subtask: {subtask}")


def _prompted(observation: Mapping[str, Any], subtask: str | None) -> Mapping[str, Any]:
    if subtask is None:
        return observation
    return {**{key: value for key, value in observation.items() if key != "task"}, "prompt": subtask}
