"""One request, from its frame to its last word: an answer, or one line that says why there is none."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ki_edge.commands import printable
from ki_edge.errors import ArgumentError, ObservationError
from ki_runtime.monitoring.events import Handled
from ki_runtime.remote.abilities import OWN
from ki_runtime.remote.packing import pack

from .question import Asked

MOST_LINE = 1000  # characters of an error that goes to a client
STAGES = ("preprocess", "prefix", "denoise", "fast", "postprocess")


@dataclass(frozen=True, eq=False)
class Outcome:
    """`kind`: as of `Handled.outcome`. An answer, or a line for the client, which may have a traceback before it."""

    kind: str
    answer: Mapping[str, Any] | None = None
    line: str | None = None
    trace: str = ""
    batch: int = 0


ENDING = Outcome("ending", line="the server ends: connect again later, or to another one")


@dataclass(eq=False)
class Request:
    """`asked` None: its frame could not be read. Times are those of time.monotonic()."""

    client: str
    asked: Asked | None
    began: float
    received: int
    done: asyncio.Future[Outcome]
    read_ms: float = 0.0
    started: float | None = None  # in the model
    previous_ms: float | None = None  # what the client's request before took in all
    written_ms: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)

    def settle(self, outcome: Outcome) -> None:
        """Its end; the first one counts."""
        if not self.done.done():
            if self.started is None and self.asked is not None:  # it does not run: its pictures take room until told
                question = replace(self.asked.question, observation={}, arguments={})
                self.asked = replace(self.asked, question=question)
            self.done.set_result(outcome)

    @property
    def id(self) -> str:
        return "" if self.asked is None else self.asked.id

    def frame(self, outcome: Outcome) -> tuple[bytes | str, Mapping[str, Any] | None]:
        """What is sent, and for an answer the map in it."""
        if outcome.answer is None:
            line = f"{outcome.kind}: {outcome.line}"
            return (f"{outcome.trace}{line}" if outcome.trace else line), None
        timing = {name: float(value) for name, value in outcome.answer.get("timing", {}).items() if name != "batch"}
        waited = 0.0 if self.started is None else 1e3 * (self.started - self.began)
        content = {
            **{name: _plain(name, value) for name, value in outcome.answer.items() if name != "timing"},
            "policy_timing": {"infer_ms": timing.get("total_ms", 0.0), **timing},
            "server_timing": {"infer_ms": self.stages.get("run", 0.0), "wait_ms": waited},
            OWN: {"id": self.id, "batch": outcome.batch},
        }
        if self.previous_ms is not None:
            content["server_timing"]["prev_total_ms"] = self.previous_ms
        for name in STAGES:
            if f"{name}_ms" in timing:
                self.stages[name] = timing[f"{name}_ms"]
        return pack(content), content

    def handled(self, outcome: Outcome, sent: int, answer: Mapping[str, Any] | None) -> Handled:
        """What watchers are told of it, now that it is over."""
        asked = self.asked
        stages = {"read": self.read_ms}
        if self.started is not None:
            stages["wait"] = 1e3 * (self.started - self.began) - self.read_ms
        stages |= {name: value for name, value in self.stages.items() if name != "run"}
        if sent:
            stages["write"] = self.written_ms
        return Handled(
            id=self.id,
            client=self.client,
            outcome=outcome.kind,
            began=self.began,
            total=1e3 * (time.monotonic() - self.began),
            stages=stages,
            batch=outcome.batch,
            received=self.received,
            sent=sent,
            error=outcome.line,
            observation=None if asked is None or self.started is None else asked.question.observation,
            answer=answer,
            reported={} if asked is None else asked.reported,
            begins=asked is not None and asked.begins,
        )


def failed(error: BaseException, *, debug: bool, kind: str | None = None, batch: int = 0) -> Outcome:
    """An error as a request's outcome; of what nobody raised on purpose the type is told too."""
    known = "observation" if isinstance(error, ObservationError) else "arguments"
    kind = kind or (known if isinstance(error, ObservationError | ArgumentError) else "policy")
    text = " ".join(str(error).split())
    if not type(error).__module__.startswith("ki_edge."):
        text = f"{type(error).__name__}: {text}"
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__)) if debug else ""
    return Outcome(kind, line=printable(text, MOST_LINE), trace=trace, batch=batch)


def _plain(name: str, value: Any) -> Any:
    """openpi's ActionChunkBroker takes a row of every array of an answer: only the actions are sent as one."""
    if name != "actions" and hasattr(value, "tolist"):
        return value.tolist()
    return value
