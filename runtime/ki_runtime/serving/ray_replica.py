"""A replica: a policy in a process of its own somewhere in a Ray cluster. It knows nothing of Ray."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ki_edge.bundle import Bundle
from ki_edge.commands import tell
from ki_edge.errors import BackendError, BundleError, DeviceError, KiEdgeError

from .engine import Answer, answered, described
from .question import Question

DEVICE_LOST = 3  # exit status


class Replica:
    """Opens, proves and warms up the bundle at `bundle`, which must be the one of this `digest` (None: any).

    `declared`: its application was deployed by a configuration file. What is wrong ends its start, with the reason.
    """

    def __init__(
        self,
        bundle: str,
        digest: str | None = None,
        *,
        backend: str = "auto",
        threads: int | None = None,
        prompt: str | None = None,
        trust_engines: bool = False,
        declared: bool = False,
    ) -> None:
        from ki_runtime.policy.policy import Policy

        opened = Bundle.open(bundle)
        found = opened.digest
        if digest is not None and found != digest:
            raise BundleError(
                f"{bundle} is another bundle now (its digest is {found[:12]}) than the one that is served "
                f"({digest[:12]}): reload the server"
            )
        self._policy = Policy.load(opened, backend, threads=threads, build=True, trust_engines=trust_engines, say=tell)
        self._policy.warm_up(prompt=prompt)
        self._facts = {**described(self._policy), "digest": found, "declared": declared}

    def describe(self) -> Mapping[str, Any]:
        """The engine's metadata; besides "digest" of the bundle, "declared" and "pid"."""
        return {**self._facts, "pid": os.getpid()}

    def answer(self, questions: Sequence[Question]) -> list[Answer | Exception]:
        """As of `Engine.answer`. A replica whose device is lost ends: only a new process can use it again."""
        answers = answered(self._policy, questions)
        if any(isinstance(answer, DeviceError) for answer in answers):
            tell("the device is lost: this replica ends")
            os._exit(DEVICE_LOST)
        return [_portable(answer) for answer in answers]


def _portable(answer: Answer | Exception) -> Answer | Exception:
    """An error that nobody raised on purpose may be of a class that the server does not have."""
    if not isinstance(answer, Exception):
        return answer
    if isinstance(answer, KiEdgeError):
        return answer.with_traceback(None)
    return BackendError(f"{type(answer).__name__}: {answer}")
