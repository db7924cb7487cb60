"""What a server tells whoever watches it: each request when it is over, and how things stand when asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ki_edge.policy.contract import PolicyContract

# A page of the server: (query, headers by lower-case name) -> (HTTP status, content type, body). Of a query and of
# headers that come twice the last one counts. Called in a thread: it may take some milliseconds.
Page = Callable[[Mapping[str, str], Mapping[str, str]], tuple[int, str, bytes]]
# What the server sends with every page.
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Handled:
    """One request that is over: answered, refused or dropped.

    `outcome`: "answered", or why not: "observation" (did not fit the contract), "arguments", "frame" (not of the
    protocol), "policy" (the model failed), "busy" (over the bound), "replaced" (by a newer one of the same client),
    "gone" (its client left before it ran), "late" (it waited longer than its client would have), "ending" (the server
    ends). `stages`: milliseconds by name, as "read", "wait", "preprocess", "model" (or "prefix", "denoise", "fast"),
    "postprocess", "write"; only those it came to. `reported`: numbers that the client sent along, since its request
    before: "deadline_misses", and "guards.RULE" for the commands that a rule of its guards changed or held back.
    """

    id: str  # as the client got it back
    client: str  # its address, as HOST:PORT
    outcome: str
    began: float  # seconds, time.monotonic(), when its frame was there
    total: float = 0.0  # milliseconds, from then until its answer or error was written, or it was dropped
    stages: Mapping[str, float] = field(default_factory=dict)
    batch: int = 0  # requests that ran with it, itself among them; 0: it did not run
    received: int = 0  # bytes of its frame
    sent: int = 0  # of its answer
    error: str | None = None  # the line that the client got
    observation: Mapping[str, Any] | None = None  # as it came, arrays read-only; None where the frame was none
    answer: Mapping[str, Any] | None = None  # as it went; None without one
    reported: Mapping[str, float] = field(default_factory=dict)
    begins: bool = False  # its client begins an episode with it


@dataclass(frozen=True)
class ClientStatus:
    address: str
    since: float  # seconds, time.monotonic()
    answered: int
    refused: int
    last_ms: float | None  # of its last answer, from frame to frame


@dataclass(frozen=True)
class Status:
    """How a server stands now. It may be asked for from any thread."""

    clients: tuple[ClientStatus, ...]
    waiting: int  # requests in the queue
    running: int  # requests in the model now
    accepting: bool  # False: it ends, or loads its first bundle
    policy: Mapping[str, Any]  # name, backend, horizon, rate, modes, versions: as in the metadata on connect
    started: float  # seconds, time.monotonic()


class Watcher(Protocol):
    """Told by the server, from its event loop: returns at once, and raises nothing."""

    def loaded(self, contract: PolicyContract, policy: Mapping[str, Any]) -> None:
        """From now on this policy answers: at the start, and after a reload. `policy`: as of `Status`."""

    def handled(self, request: Handled) -> None: ...

    def connected(self, client: str) -> None: ...

    def left(self, client: str, why: str) -> None: ...

    def close(self) -> None:
        """The server has ended: what is still to be written is written, within a second. Not from the event loop."""
