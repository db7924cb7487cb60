"""What tests of the server share: a policy whose inferences end when a test lets them, and a plain client."""

import threading
import time
from contextlib import contextmanager

import numpy as np
from websockets.sync.client import connect

from ki_edge.errors import ObservationError
from ki_runtime.remote.packing import pack, unpack
from ki_runtime.serving import Server, ServerOptions

from .policy_server import CONTRACT, SEEN

PATIENCE = 60.0


class HeldPolicy:
    """Answers its observation's first number in every action, once `go` is set; `calls`: what it was asked."""

    contract = CONTRACT
    rtc, max_delay = "guided", None

    def __init__(self, held=False):
        self.calls, self.batches = [], []
        self.go, self.running = threading.Event(), threading.Semaphore(0)
        if not held:
            self.go.set()

    def infer(self, observation, **arguments):
        self.calls.append((observation, arguments))
        self.running.release()
        assert self.go.wait(PATIENCE)
        if "state" not in observation:
            raise ObservationError("state is missing; expected {}")
        if observation.get("prompt") == "break":
            raise RuntimeError("an engine\nbroke")
        actions = np.full((5, 2), float(observation["state"][0]))
        return {"actions": actions, "timing": {"preprocess_ms": 1.0, "denoise_ms": 2.0, "total_ms": 3.0}}

    def wait(self, count=1):
        """Until so many more inferences have begun."""
        for _ in range(count):
            assert self.running.acquire(timeout=PATIENCE)


class BatchPolicy(HeldPolicy):
    def infer_many(self, requests):
        self.batches.append(requests)
        answers = []
        for request in requests:
            try:
                given = {name: value for name, value in vars(request).items() if value is not None}
                answers.append(self.infer(**given))
            except Exception as error:
                answers.append(error)
        return answers


class Watching:
    """Keeps what the server tells."""

    def __init__(self):
        self.requests, self.policies, self.events = [], [], []

    def loaded(self, contract, policy):
        self.policies.append((contract, policy))

    def handled(self, request):
        self.requests.append(request)

    def connected(self, client):
        self.events.append(("connected", client))

    def left(self, client, why):
        self.events.append(("left", client))

    def close(self):
        self.events.append(("closed", ""))

    def wait(self, count):
        """The requests, once there are so many."""
        wait_until(lambda: len(self.requests) >= count)
        return self.requests


def wait_until(is_so):
    """Until something is so; fails where it does not come."""
    end = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.002)


def in_line(server, wanted):
    """Until the observations that wait are these, in this order."""
    room = server._room._requests

    def found():
        return [int(request.asked.question.observation["state"][0]) for request in list(room.values())]

    wait_until(lambda: found() == wanted)


@contextmanager
def serving(policy, watching=None, load=None, **options):
    said = []
    server = Server(
        policy, ServerOptions(port=0, **options), watchers=[watching] if watching else [], load=load, say=said.append
    )
    server.said = said
    with server:
        yield server


@contextmanager
def connected(server, **headers):
    """A plain client behind the metadata."""
    with connect(server.uri, compression=None, max_size=None, additional_headers=headers, proxy=None) as socket:
        socket.metadata = unpack(socket.recv(timeout=PATIENCE), "server")
        yield socket


def seen(number=0.0, **more):
    return {**SEEN, "state": np.array([number, 0.0]), **more}


def send(socket, content):
    socket.send(content if isinstance(content, bytes | str) else pack(content))


def take(socket):
    """An answer, or the line of an error."""
    frame = socket.recv(timeout=PATIENCE)
    return frame if isinstance(frame, str) else unpack(frame, "server")


def ask(socket, content):
    send(socket, content)
    return take(socket)
