"""A policy server as a policy: the control loop here, the model on another machine.

It speaks openpi's protocol, so openpi's own server serves as well. What such a server does not tell is the contract:
the shapes and names of what goes out and comes back.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.arguments import array_of
from ki_edge.commands import tell
from ki_edge.errors import ArgumentError, BackendError, ContractError
from ki_edge.policy.contract import PolicyContract
from ki_edge.policy.images import METHODS
from ki_edge.policy.keys import FLAT_ROBOTS, under_contract_keys
from ki_edge.policy.presets import PRESETS, find_preset
from ki_edge.policy.transforms import read_images, read_state
from ki_runtime.policy.warming import Prepared, blank_observation

from .connection import Connection, Lost
from .packing import pack

KEY = "KI_API_KEY"  # variable: the server's key
FIRST = 600.0  # seconds for the first answers: a server may compile meanwhile
ANSWER = 30.0  # for any other; the loop stops the robot long before
ABSENCE = 10.0  # seconds for a server that is gone to come back
PAUSE = 0.2  # between two looks whether it is back


class RemotePolicy:
    """Asks the server at `uri` for actions. Use it from one thread at a time; `close` from any.

    `contract`: None: the server's metadata must have it, as {"ki_edge": {"contract": ...}}. A server that is gone is
    waited for, for `absence` seconds, and asked again: robot and loop hold meanwhile. Anything else that is wrong with
    an answer ends the run as an error of the policy does. Errors: `Connection`'s; ContractError without a contract.
    """

    rtc = None  # openpi's protocol has no place for the previous chunk
    max_delay = None

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
            self.contract = _contract(uri, self._connection.metadata, contract)
        except BaseException:
            self.close()
            raise
        self._metadata_contract = _told(self._connection.metadata)

    def infer(
        self, observation: Mapping[str, Any], *, noise: npt.ArrayLike | None = None, num_steps: int | None = None
    ) -> dict[str, Any]:
        """{"actions": float64 [H, action_dim] in robot units, "timing": milliseconds}.

        The server draws its own noise: `noise` does not reach it, and a run cannot be repeated from its seed.
        ObservationError for an observation that does not fit the contract; BackendError for answers as above, and of
        another shape than the contract's; ArgumentError for `num_steps`, which the server decides.
        """
        return self._infer(observation, num_steps, self._answer)

    def warm_up(self, *, prompt: str | None = None, num_steps: int | None = None, fast: bool = False) -> Prepared:
        """Ask twice about grey pictures and a state of zeros: the first answer may take long, since a server may
        compile; the second tells how long an inference takes, with its way there and back.
        """
        start = time.perf_counter()
        observation = blank_observation(self.contract, prompt)
        self._infer(observation, num_steps, FIRST)
        begun = time.perf_counter()
        self._infer(observation, num_steps, FIRST)
        now = time.perf_counter()
        cameras = sum(camera.key is not None for camera in self.contract.cameras)
        return Prepared((cameras,), (), self.contract.num_steps, False, 1e3 * (now - start), 1e3 * (now - begun))

    def close(self) -> None:
        """End the connection; a question that waits for its answer ends with an error."""
        self._closed.set()
        self._connection.close()

    def _infer(self, observation: Mapping[str, Any], num_steps: int | None, patience: float) -> dict[str, Any]:
        if num_steps is not None:
            raise ArgumentError(f"num_steps {num_steps}: the server at {self._uri} decides how many steps it takes")
        start = time.perf_counter()
        question = pack(outgoing(self.contract, observation))
        packed = time.perf_counter()
        answer = self._ask(question, patience)
        answered = time.perf_counter()
        timing = {"preprocess_ms": 1e3 * (packed - start)}
        timing |= _server_timing(answer, 1e3 * (answered - packed))
        return {
            "actions": _actions(answer, self.contract, self._uri),
            "timing": {**timing, "total_ms": 1e3 * (time.perf_counter() - start)},
        }

    def _ask(self, question: bytes, patience: float) -> Mapping[str, Any]:
        """The answer; of a server that was gone, once it is back."""
        since: float | None = None
        while True:
            try:
                if since is not None:
                    self._reconnect()
                return self._connection.ask(question, patience)
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

    def _connect(self) -> Connection:
        return Connection(self._uri, os.environ.get(KEY) or None)

    def _reconnect(self) -> None:
        self._connection = self._connect()
        if self._closed.is_set():
            self._connection.close()
        if _told(self._connection.metadata) != self._metadata_contract:
            self._connection.close()
            raise BackendError(f"{self._uri} is back with another policy: start the run again")


def read_contract(given: str) -> PolicyContract:
    """The contract that `given` names: a JSON file, or the name of one of openpi's training configurations.

    ArgumentError for what is neither; ContractError.
    """
    preset = find_preset(given)
    if preset is not None:
        if preset.horizon is None:
            raise ArgumentError(
                f"--contract {given}: its public configurations differ in their horizon, {preset.horizons}: name one"
            )
        return preset.contract()
    if not Path(given).is_file():
        raise ArgumentError(f"--contract {given:.200}: neither a file nor one of {', '.join(PRESETS)}")
    return PolicyContract.load(given)


def outgoing(contract: PolicyContract, observation: Mapping[str, Any]) -> dict[str, Any]:
    """An observation as it is sent: the contract's keys, pictures as uint8 arrays, already of the model's size where
    the policy's makers resized bytes. ObservationError if it does not fit the contract.
    """
    found = dict(under_contract_keys(contract, observation))
    read_state(contract, found)
    pictures = _pictures(contract, found)
    if contract.robot in FLAT_ROBOTS:
        return {**{key: value for key, value in found.items() if "image" not in key}, **pictures}
    if contract.robot == "aloha":  # whose server expects the colours first
        pictures = {key: np.ascontiguousarray(picture.transpose(2, 0, 1)) for key, picture in pictures.items()}
    return {**found, "images": pictures}


def _pictures(contract: PolicyContract, observation: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """Pictures [h, w, 3] by the contract's key, of the cameras that are there."""
    images, there = read_images(contract, observation)
    given = observation if contract.robot in FLAT_ROBOTS else observation["images"]
    sized = METHODS[contract.resize].pictures == "uint8"
    found = {}
    for camera, image, present in zip(contract.cameras, images, there, strict=True):
        if camera.key is not None and present:
            raw = image if sized else array_of(given[camera.key], f"camera {camera.key}")
            found[camera.key] = raw.transpose(1, 2, 0) if raw.shape[0] == 3 and not sized else raw
    return found


def _contract(uri: str, metadata: Mapping[str, Any], given: PolicyContract | None) -> PolicyContract:
    told = _told(metadata)
    if given is not None:
        return given
    if told is None:
        raise ContractError(
            f"{uri} does not tell its policy's contract, as a server of openpi does not: give --contract FILE, or the "
            "name of openpi's training configuration, such as pi05_droid"
        )
    return PolicyContract.from_json(told)


def _told(metadata: Mapping[str, Any]) -> Any:
    """The contract that a server's metadata has."""
    own = metadata.get("ki_edge")
    return own.get("contract") if isinstance(own, Mapping) else None


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
    return actions.astype(np.float64)


def _server_timing(answer: Mapping[str, Any], whole: float) -> dict[str, float]:
    """How long the server says that it inferred, and what the way there and back took besides."""
    told = answer.get("server_timing")
    found = told.get("infer_ms") if isinstance(told, Mapping) else None
    if isinstance(found, int | float | np.number) and np.isfinite(found) and 0 <= found <= whole:
        return {"server_ms": float(found), "network_ms": whole - float(found)}
    return {"network_ms": whole}
