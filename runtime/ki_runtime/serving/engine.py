"""What answers questions: a policy in a thread of its own here, or anything behind the same few names."""

from __future__ import annotations

import asyncio
import platform
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Protocol

from ki_edge.errors import ArgumentError, BackendError
from ki_edge.policy.contract import PolicyContract
from ki_runtime.policy import rows
from ki_runtime.policy.proof import own_version

from .question import Question

Answer = Mapping[str, Any]
POLICY_THREAD = "policy"
PATIENCE = 1.0  # seconds that `close` waits for what runs


class Engine(Protocol):
    """`contract` of its policy; `metadata`: what clients are told of it, JSON values; `largest_batch`: how many
    questions it takes at once.
    """

    contract: PolicyContract
    metadata: Mapping[str, Any]
    largest_batch: int

    async def answer(self, questions: Sequence[Question]) -> Sequence[Answer | Exception]:
        """For each question what the policy gives, or the error that it raises."""

    def close(self) -> None:
        """No question comes any more."""


class LocalEngine:
    """A policy in one thread, which the event loop never waits for. `name`: how pages call it."""

    def __init__(self, policy: Any, *, largest_batch: int = 1, name: str | None = None) -> None:
        self.policy, self.contract = policy, policy.contract
        self.largest_batch = largest_batch if hasattr(policy, "infer_many") else 1
        self.metadata: Mapping[str, Any] = described(policy, name)
        self._tasks: SimpleQueue[tuple[asyncio.Future[Any], Sequence[Question]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=POLICY_THREAD, daemon=True)
        self._thread.start()

    async def answer(self, questions: Sequence[Question]) -> Sequence[Answer | Exception]:
        future: asyncio.Future[Sequence[Answer | Exception]] = asyncio.get_running_loop().create_future()
        self._tasks.put((future, questions))
        return await future

    def close(self) -> None:
        """Wait for what runs, for a moment: an engine that hangs is left behind."""
        self._tasks.put(None)
        self._thread.join(PATIENCE)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, questions = task
            try:
                answers: Sequence[Answer | Exception] = answered(self.policy, questions)
            except BaseException as error:  # a thread that dies would leave all clients waiting
                answers = [BackendError(f"{type(error).__name__}: {error}")] * len(questions)
            try:
                future.get_loop().call_soon_threadsafe(_settle, future, answers)
            except RuntimeError:  # the loop has ended: nobody waits
                return
            del task, future, questions, answers  # pictures, while there is nothing to do


def answered(policy: Any, questions: Sequence[Question]) -> list[Answer | Exception]:
    """Each question by one call, or all of them in one batch."""
    if len(questions) > 1 and hasattr(policy, "infer_many"):
        with suppress(Exception):  # an error of nobody's intent is that of one of them: it is found alone
            return list(policy.infer_many([rows.Question(one.observation, **one.arguments) for one in questions]))
    return [_one(policy, question) for question in questions]


def described(policy: Any, name: str | None = None) -> dict[str, Any]:
    """What clients are told of a policy: JSON values."""
    contract = policy.contract
    sampler = getattr(policy, "sampler", None)
    backend = getattr(sampler, "backend", None)
    bundle = getattr(sampler, "bundle", None)
    return {
        "name": name or ("policy" if bundle is None else bundle.path.resolve().name),
        "contract": contract.to_json(),
        "horizon": contract.action_horizon,
        "action_dim": contract.action_dim,
        "rate": contract.control_hz,
        "modes": ["sync", "async", *(["rtc"] if getattr(policy, "rtc", None) else [])],
        "rtc": getattr(policy, "rtc", None),
        "max_delay": getattr(policy, "max_delay", None),
        "heads": _heads(policy),
        "num_steps": getattr(sampler, "num_steps", contract.num_steps),
        "noise": [contract.action_horizon, contract.model_action_dim],
        "backend": getattr(backend, "name", None),
        "device": getattr(backend, "device", None),
        "proof": getattr(backend, "proof", None) or None,
        "versions": {"ki-edge": own_version(), "python": platform.python_version()},
    }


def _heads(policy: Any) -> list[str]:
    found = ["flow"]
    if policy.contract.fast is not None and hasattr(policy, "infer_fast"):
        found.append("fast")
    if hasattr(policy, "check_text"):
        with suppress(ArgumentError):
            policy.check_text()
            found.append("text")
    return found


def _one(policy: Any, question: Question) -> Answer | Exception:
    call = {"flow": "infer", "fast": "infer_fast", "text": "infer_text"}[question.head]
    try:
        found: Answer = getattr(policy, call)(question.observation, **question.arguments)
    except Exception as error:
        return error
    return found


def _settle(future: asyncio.Future[Any], answers: Sequence[Answer | Exception]) -> None:
    if not future.done():
        future.set_result(answers)
