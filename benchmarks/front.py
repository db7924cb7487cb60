"""What ki-serve's own event loop takes for a request, for benchmarks/fleet.py: the model is left out."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


class Nothing:
    """An engine that answers at once, so that only the server's own work is left."""

    contract: Any = None
    metadata: Mapping[str, Any] = {"name": "nothing"}
    largest_batch = 1

    async def answer(self, questions: Sequence[Any]) -> list[Mapping[str, Any]]:
        return [{"actions": np.zeros((15, 8)), "timing": {}} for _ in questions]

    def close(self) -> None:
        """Nothing to end."""


ROBOT = """
import sys, time
import numpy as np
from websockets.sync.client import connect
from ki_runtime.remote.packing import pack
pictures = {str(i): np.random.default_rng(i).integers(0, 256, (224, 224, 3), np.uint8) for i in range(2)}
frame = pack({"images": pictures, "state": np.zeros(8, np.float32), "prompt": "pick up the red cube"})
with connect(sys.argv[1], max_size=None, compression=None) as server:
    server.recv()
    for _ in range(int(sys.argv[2])):
        server.send(frame)
        server.recv()
"""


def front_ms(requests: int = 500, clients: int = 2) -> float:
    """Processor time here that ki-serve's event loop takes for a request with raw pictures, its model left out."""
    from ki_runtime.serving import Server, ServerOptions

    with Server(Nothing(), ServerOptions(port=0)) as server:
        command = [sys.executable, "-c", ROBOT, server.uri]
        subprocess.run([*command, "20"], check=True)
        start = time.process_time()
        robots = [subprocess.Popen([*command, str(requests)]) for _ in range(clients)]
        if any([robot.wait() for robot in robots]):  # noqa: C419 (wait for all of them)
            raise RuntimeError("a robot failed")
        return 1e3 * (time.process_time() - start) / (requests * clients)
