"""A policy server as a policy: the control loop here, the model on another machine.

It speaks openpi's protocol, so openpi's own server serves as well. What such a server does not tell is the contract:
the shapes and names of what goes out and comes back.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.arguments import array_of
from ki_edge.commands import tell
from ki_edge.errors import ArgumentError, BackendError
from ki_edge.policy.chunking import Guiding, PreviousChunk, Way
from ki_edge.policy.contract import PolicyContract
from ki_runtime.policy.guard import finite_actions
from ki_runtime.policy.warming import Prepared, blank_observation

from .abilities import OWN, Abilities, contract_of, rtc_asked
from .connection import OPENING, Connection, Lost
from .observation import outgoing
from .packing import pack

KEY = "KI_API_KEY"  # variable: the server's key
FIRST = 600.0  # seconds for the first answers: a server may compile meanwhile
ANSWER = 30.0  # for any other; the loop stops the robot long before
ABSENCE = 10.0  # seconds for a server that is gone to come back
PAUSE = 0.2  # between two looks whether it is back
LEAST = 0.5  # for a connection, at the end of the absence
OUTDATED = "outdated"  # of a result: its observation is from before the server was away


class RemotePolicy:
    """Asks the server at `uri` for actions. Use it from one thread at a time; `close` from any.

    `contract`: None: the server's metadata must have it, as {"ki_edge": {"contract": ...}}. A server that is gone is
    waited for, for `absence` seconds, and asked again: robot and loop hold meanwhile. Anything else that is wrong with
    an answer ends the run as an error of the policy does. Errors: `Connection`'s; ContractError without a contract.
    """

    def __init__(
        self,
        uri: str,
        contract: PolicyContract | None = None,
        *,
        answer: float = ANSWER,
        absence: float = ABSENCE,
        say: Callable[[str], object] = tell,
    ) -> None:
        if not isinstance(uri, str) or not uri.startswith(("ws://", "wss://")):
            raise ArgumentError(f"{uri!r:.200} is no address of a policy server: expected ws://HOST:PORT")
        self._uri, self._answer, self._absence, self._say = uri, answer, absence, say
        self._closed = threading.Event()
        self._connection = self._connect()
        try:
            self._abilities = Abilities.of(self._connection.metadata)
            self.contract = contract_of(uri, self._abilities.contract, contract)
        except BaseException:
            self.close()
            raise
        self._begins = False
        self._counted: dict[str, int] = {}  # in all
        self._reported: dict[str, int] = {}  # of it, what the server knows

    @property
    def rtc(self) -> Way | None:
        """How the server continues a previous chunk; None: it does not, as openpi's protocol has no place for one."""
        return self._abilities.rtc

    @property
    def max_delay(self) -> int | None:
        """As of `Policy`."""
        return self._abilities.max_delay

    @property
    def without_rtc(self) -> str:
        """Why not, where it does not."""
        if self._abilities.extended:
            return f"the bundle of {self._uri} was exported without real-time chunking: use mode async"
        return f"openpi's protocol does not tell {self._uri} what is executed meanwhile: use ki-serve, or mode async"

    def reset(self) -> None:
        """An episode begins: the next question says so."""
        self._begins = True

    def report(self, counts: Mapping[str, int]) -> None:
        """What was counted so far, by name: a server of ours is told what is new of it with the next question."""
        self._counted = dict(counts)

    def infer(
        self,
        observation: Mapping[str, Any],
        *,
        noise: npt.ArrayLike | None = None,
        seed: int | None = None,
        num_steps: int | None = None,
        previous: PreviousChunk | None = None,
        way: Way | None = None,
        guiding: Guiding | None = None,
    ) -> dict[str, Any]:
        """{"actions": float64 [H, action_dim] in robot units, "timing": milliseconds}; arguments as of `Policy.infer`.

        A server of openpi draws its own noise: `noise` and `seed` do not reach it, and a run cannot be repeated.
        ObservationError for an observation that does not fit the contract; BackendError for answers as above, and of
        another shape than the contract's; ArgumentError for `num_steps` and `previous`, of which it knows nothing.
        """
        asked: dict[str, Any] = {"noise": noise, "seed": seed, "num_steps": num_steps}
        if previous is not None:
            if self.rtc is None:
                raise ArgumentError(self.without_rtc)
            asked["rtc"] = rtc_asked(previous, way, guiding)
        return self._infer(observation, asked, self._answer)

    def warm_up(self, *, prompt: str | None = None, num_steps: int | None = None, fast: bool = False) -> Prepared:
        """Ask twice about grey pictures and a state of zeros: the first answer may take long, since a server may
        compile; the second tells how long an inference takes, with its way there and back.
        """
        start = time.perf_counter()
        observation, asked = blank_observation(self.contract, prompt), {"num_steps": num_steps}
        self._infer(observation, asked, FIRST)
        begun = time.perf_counter()
        self._infer(observation, asked, FIRST)
        now = time.perf_counter()
        cameras = sum(camera.key is not None for camera in self.contract.cameras)
        steps = num_steps or self.contract.num_steps
        return Prepared((cameras,), (), steps, False, 1e3 * (now - start), 1e3 * (now - begun))

    def close(self) -> None:
        """End the connection; a question that waits for its answer ends with an error."""
        self._closed.set()
        self._connection.close()

    def _infer(self, observation: Mapping[str, Any], asked: Mapping[str, Any], patience: float) -> dict[str, Any]:
        start = time.perf_counter()
        content = outgoing(self.contract, observation)
        if extension := self._extension(asked, patience):
            content[OWN] = extension
        question = pack(content)
        packed = time.perf_counter()
        answer, outdated = self._ask(question, patience)
        self._begins, self._reported = False, self._counted
        answered = time.perf_counter()
        timing = {"preprocess_ms": 1e3 * (packed - start)}
        timing |= _server_timing(answer, 1e3 * (answered - packed))
        return {
            "actions": _actions(answer, self.contract, self._uri),
            OUTDATED: outdated,
            "timing": {**timing, "total_ms": 1e3 * (time.perf_counter() - start)},
        }

    def _extension(self, asked: Mapping[str, Any], patience: float) -> dict[str, Any]:
        """What goes out beside the observation; nothing to a server of openpi."""
        if not self._abilities.extended:
            if (steps := asked.get("num_steps")) is not None:
                raise ArgumentError(f"num_steps {steps}: the server at {self._uri} decides how many steps it takes")
            return {}
        told = {name: value for name, value in asked.items() if value is not None}
        if "noise" in told:
            noise = array_of(told["noise"], "noise")
            told["noise"] = noise[0] if noise.ndim == 3 and len(noise) == 1 else noise
        news = {name: count - self._reported.get(name, 0) for name, count in self._counted.items()}
        if news := {name: count for name, count in news.items() if count > 0}:
            told["reported"] = news
        return told | {"patience_ms": 1e3 * patience} | ({"begins": True} if self._begins else {})

    def _ask(self, question: bytes, patience: float) -> tuple[Mapping[str, Any], bool]:
        """The answer, and whether it comes from a server that was gone meanwhile, and is back."""
        since: float | None = None
        while True:
            try:
                if since is not None:
                    self._reconnect(self._absence - (time.monotonic() - since))
                return self._connection.ask(question, patience), since is not None
            except Lost as error:
                now = time.monotonic()
                if self._closed.is_set():
                    raise BackendError(f"the connection to {self._uri} was closed") from None
                if since is None:
                    since = now
                    self._say(f"{error}; it is asked again once it is back")
                if now - since > self._absence:
                    raise BackendError(f"{error}; it did not come back within {self._absence:g} s") from None
                self._closed.wait(PAUSE)

    def _connect(self, patience: float = OPENING) -> Connection:
        return Connection(self._uri, os.environ.get(KEY) or None, patience)

    def _reconnect(self, patience: float) -> None:
        self._connection = self._connect(min(OPENING, max(LEAST, patience)))
        if self._closed.is_set():
            self._connection.close()
        if Abilities.of(self._connection.metadata) != self._abilities:
            self._connection.close()
            raise BackendError(f"{self._uri} is back with another policy: start the run again")


def _actions(answer: Mapping[str, Any], contract: PolicyContract, uri: str) -> npt.NDArray[np.float64]:
    if "actions" not in answer:
        raise BackendError(f"{uri} answered {', '.join(map(str, answer))[:200] or 'nothing'}, expected actions")
    actions = array_of(answer["actions"], f"actions of {uri}", BackendError)
    wanted = (contract.action_horizon, contract.action_dim)
    if actions.shape != wanted or actions.dtype.kind not in "fiu":
        raise BackendError(
            f"{uri} answered actions {actions.dtype} {list(actions.shape)}, and the contract has "
            f"{list(wanted)}: is it the contract of the server's policy (--contract)?"
        )
    try:
        finite_actions(actions, contract.action_names)
    except BackendError as error:
        raise BackendError(f"{uri}: {error}") from None
    return actions.astype(np.float64)


def _server_timing(answer: Mapping[str, Any], whole: float) -> dict[str, float]:
    """How long the server says that it inferred, and what the way there and back took besides."""
    told = answer.get("server_timing")
    found = told.get("infer_ms") if isinstance(told, Mapping) else None
    if isinstance(found, int | float | np.number) and np.isfinite(found) and 0 <= found <= whole:
        return {"server_ms": float(found), "network_ms": whole - float(found)}
    return {"network_ms": whole}
