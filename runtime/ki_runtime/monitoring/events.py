"""What a server tells whoever watches it: each request when it is over, and how things stand when asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Handled:
    """One request that is over: answered, refused or dropped.

    `outcome`: "answered", or why not: "observation" (did not fit the contract), "arguments", "frame" (not of the
    protocol), "policy" (the model failed), "busy" (over the bound), "replaced" (by a newer one of the same client),
    "gone" (its client left before it ran), "late" (it waited longer than its client would have). `stages`: milliseconds
    by name, as "read", "wait", "preprocess", "model", "postprocess", "write"; only those it came to.
    """

    id: str  # as the client got it back
    client: str  # its address, as HOST:PORT
    outcome: str
    began: float  # seconds, time.monotonic(), when its frame was there
    stages: Mapping[str, float] = field(default_factory=dict)
    batch: int = 0  # requests that ran with it, itself among them; 0: it did not run
    received: int = 0  # bytes of its frame
    sent: int = 0  # of its answer
    error: str | None = None  # the line that the client got
    observation: Mapping[str, Any] | None = None  # as it came, arrays read-only; None where the frame was none
    answer: Mapping[str, Any] | None = None  # as it went; None without one
    reported: Mapping[str, float] = field(default_factory=dict)  # what the client told, as "deadline_misses", "guards"


@dataclass(frozen=True)
class ClientStatus:
    address: str
    since: float  # seconds, time.monotonic()
    answered: int
    refused: int
    last_ms: float | None  # of its last answer, from frame to frame


@dataclass(frozen=True)
class Status:
    """How a server stands now."""

    clients: tuple[ClientStatus, ...]
    waiting: int  # requests in the queue
    running: int  # requests in the model now
    accepting: bool  # False: it ends, or loads its first bundle
    policy: Mapping[str, Any]  # name, backend, horizon, rate, modes, versions: as in the metadata on connect
    started: float  # seconds, time.monotonic()


class Watcher(Protocol):
    """Told by the server, from its event loop: returns at once, and raises nothing."""

    def handled(self, request: Handled) -> None: ...

    def connected(self, client: str) -> None: ...

    def left(self, client: str, why: str) -> None: ...
