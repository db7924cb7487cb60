"""A replica: a policy in a process of its own somewhere in a Ray cluster. It knows nothing of Ray."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ki_edge.bundle import Bundle
from ki_edge.commands import tell
from ki_edge.errors import BackendError, BundleError, DeviceError, KiEdgeError

from .engine import Answer, answered
from .loading import ServedBundle
from .question import Question

DEVICE_LOST = 3  # exit status


class Replica:
    """Opens, proves and warms up the bundle at `bundle`, which must be the one of this `digest` (None: any).

    `again`: it replaces one that is served, so its hashes and its witness are checked first; `declared`: its
    application was deployed by a configuration file. What is wrong ends its start, with the reason.
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
        largest_batch: int = 1,
        again: bool = False,
        declared: bool = False,
    ) -> None:
        found = Bundle.open(bundle).digest
        if digest is not None and found != digest:
            raise BundleError(
                f"{bundle} is another bundle now (its digest is {found[:12]}) than the one that is served "
                f"({digest[:12]}): reload the server"
            )
        served = ServedBundle(
            bundle,
            backend,
            threads=threads,
            prompt=prompt,
            trust_engines=trust_engines,
            largest_batch=largest_batch,
            say=tell,
        )
        engine = served.again() if again else served.open()
        self._policy = engine.policy
        self._facts = {
            **engine.metadata, "largest_batch": engine.largest_batch, "digest": found, "declared": declared
        }  # fmt: skip

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
