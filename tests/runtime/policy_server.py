"""A policy server of openpi's kind over real websockets, that misbehaves as it is told."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import msgpack
import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from ki_edge.policy import contract as contracts

Answers = Callable[[int, Mapping[str, Any]], Any]  # (number of the question, the observation) -> what is sent, or None


CONTRACT = contracts.generic(
    ["cam"], state_dim=2, action_dim=2, action_horizon=5, execute=3, model_action_dim=4, image_size=(8, 8)
)
PICTURE = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
SEEN = {"images": {"cam": PICTURE}, "state": np.array([0.5, 1.5]), "prompt": "fold"}
ROWS = np.arange(10.0, dtype=np.float32).reshape(5, 2)


def rows(number: int, observation: Mapping[str, Any]) -> dict[str, Any]:
    return {"actions": ROWS + number, "server_timing": {"infer_ms": 0.01}, "state": observation["state"]}


def plain(value: Any) -> Any:
    """openpi's form of arrays, written by itself."""
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    raise TypeError(type(value))


def arrays(found: dict[Any, Any]) -> Any:
    if b"__ndarray__" in found:
        return np.ndarray(buffer=found[b"data"], dtype=np.dtype(found[b"dtype"]), shape=found[b"shape"])
    return found


class PolicyServer:
    """`answers` gives, for each question, a map to pack, raw bytes, a text, a list of those, or None: hang up.

    `asked`: the observations; `headers`: of each connection. Keeps its port over `stop` and `start`.
    """

    def __init__(self, answers: Answers, metadata: Any = None) -> None:
        self.answers, self.metadata = answers, {} if metadata is None else metadata
        self.asked: list[Any] = []
        self.headers: list[Any] = []
        self._open: set[ServerConnection] = set()
        self._port = 0
        self.start()

    @property
    def uri(self) -> str:
        return f"ws://127.0.0.1:{self._port}"

    def start(self) -> None:
        self._server = serve(self._handle, "127.0.0.1", self._port, compression=None, max_size=None)
        self._port = self._server.socket.getsockname()[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Be gone: nobody listens, and every connection ends at once. Not from within `answers`: it waits for that."""
        for connection in list(self._open):
            connection.close_socket()
        self._server.shutdown()
        self._thread.join()

    def _handle(self, connection: ServerConnection) -> None:
        self._open.add(connection)
        self.headers.append(connection.request.headers)
        try:
            self._send(connection, self.metadata)
            for frame in connection:
                observation = msgpack.unpackb(frame, object_hook=arrays)
                self.asked.append(observation)
                answer = self.answers(len(self.asked) - 1, observation)
                if answer is None:
                    connection.close_socket()
                    return
                for one in answer if isinstance(answer, list) else [answer]:
                    self._send(connection, one)
        except (ConnectionClosed, OSError):
            return
        finally:
            self._open.discard(connection)

    def _send(self, connection: ServerConnection, answer: Any) -> None:
        connection.send(answer if isinstance(answer, bytes | str) else msgpack.packb(answer, default=plain))
