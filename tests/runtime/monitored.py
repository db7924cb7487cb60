"""Requests as a server tells of them, and the pages of a monitor over real HTTP."""

import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from urllib.error import HTTPError
from urllib.parse import parse_qsl, urlsplit
from urllib.request import Request, urlopen

import numpy as np

from ki_edge.policy import contract as contracts
from ki_runtime.monitoring.events import HEADERS, ClientStatus, Handled, Status

HORIZON, ROBOT = 5, "127.0.0.1:40001"
CONTRACT = contracts.generic(
    ["front", "wrist/left"],
    state_dim=3,
    action_dim=2,
    action_horizon=HORIZON,
    execute=2,
    model_action_dim=4,
    image_size=(8, 8),
    control_hz=20.0,
)
SIZES = {"front": (48, 64), "wrist/left": (33, 40)}  # height, width; one is odd
POLICY = {"name": "fetch", "backend": "ort", "horizon": HORIZON, "rate": 20.0, "versions": {"ki-edge": "0.1.0"}}


def level(number):
    """The grey of a request's pictures, which H.264 keeps to a few steps."""
    return 30 + number * 23 % 200


def seen(number, sizes=None):
    """The observation of a request, read-only as a frame's arrays are."""
    images = {name: np.full((*size, 3), level(number), np.uint8) for name, size in (sizes or SIZES).items()}
    found = {"images": images, "state": np.array([number, 0.5, -1.0]), "prompt": "count"}
    for array in (*images.values(), found["state"]):
        array.setflags(write=False)
    return MappingProxyType(found)


def answer(number):
    rows = number + np.arange(HORIZON)
    return {"actions": np.stack([rows, -rows], axis=1).astype(np.float64)}


def answered(number=0, client=ROBOT, **changes):
    facts = {
        "id": f"r{number}",
        "client": client,
        "outcome": "answered",
        "began": 100.0 + number / 10,
        "total": 42.0 + number,
        "stages": {"read": 1.0, "wait": 3.0, "preprocess": 2.0, "model": 35.0, "postprocess": 0.5, "write": 0.5},
        "batch": 2,
        "received": 10_000,
        "sent": 500,
        "observation": seen(number),
        "answer": answer(number),
    }
    return Handled(**{**facts, **changes})


def refused(outcome="observation", error="state has shape (2,)", **changes):
    nothing = {"batch": 0, "sent": 60, "answer": None, "stages": {"read": 1.0}, "observation": None}
    return answered(outcome=outcome, error=error, **{**nothing, **changes})


def status(*clients, **changes):
    now = time.monotonic()
    listed = tuple(ClientStatus(client, now - 75.0, 12, 1, 42.5) for client in clients)
    facts = {"clients": listed, "waiting": 3, "running": 2, "accepting": True, "policy": POLICY, "started": now - 300.0}
    return Status(**{**facts, **changes})


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        parts = urlsplit(self.path)
        page = self.server.pages.get(parts.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        code, kind, body = (
            page(dict(parse_qsl(parts.query)), headers) if page else (404, "text/plain", b"no such page\n")
        )
        self.send_response(code)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Says nothing."""


@contextmanager
def hosted(pages):
    """The address of a server that shows these pages."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.pages = pages
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def get(address, **headers):
    """(status, headers, body) of an address."""
    try:
        with urlopen(Request(address, headers=headers), timeout=30) as reply:
            return reply.status, reply.headers, reply.read()
    except HTTPError as error:
        with error:
            return error.code, error.headers, error.read()
