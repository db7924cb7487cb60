"""Mutated frames, options and headers, sent to a real ki-serve: each is answered, refused in one line, or cut off.

`python tests/fuzz_server.py BUNDLE --cases 10000 --seed 1` starts the server and counts; `tests/test_fuzz_server.py`
keeps a few hundred. After each hundred cases a sound question must get the same answer as at the start, bit for bit,
and at the end the server must have the memory that it had.
"""

import argparse
import collections
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgpack
import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from ki_edge.bundle import Bundle
from ki_edge.proc import sizes
from ki_runtime.policy.assets import read_assets
from ki_runtime.remote.packing import pack, unpack

LIMIT = 20.0  # seconds for an answer of any kind
GROWTH = 64 << 20  # bytes of memory that may stay with the server: allocators keep some
EVERY = 100
ARRAY = {b"__ndarray__": True, b"data": b"", b"dtype": "<f4", b"shape": [0]}
SCALAR = {b"__npgeneric__": True, b"data": 1, b"dtype": "<f8"}
SHAPES = [[2**62, 4], [-1], [0] * 40, 3, [2**31, 0], [1]]
TYPES = ["O", "V8", "<U999999999", "c16", "(1000,1000)f8", "M8[s]", "f4,f4", None]
VALUES = [
    None, True, False, 0, -1, 1, 2**63, -(2**63), 1.5, float("nan"), float("inf"), 1e308, "", "x", "\x1b[2J", "a\0b",
    "x" * 100_000, b"", b"\xff" * 1000, [], {}, [[[[]]]], [1, "a", None], {"a": {"b": []}}, {1: 2}, [0] * 10_000,
    *({**ARRAY, b"shape": shape} for shape in SHAPES), *({**ARRAY, b"dtype": name} for name in TYPES),
    {**ARRAY, b"data": "text"}, {**ARRAY, b"data": b"abc", b"shape": [1]}, {b"__ndarray__": True},
    {**SCALAR, b"data": "x"}, {**SCALAR, b"data": 2**63, b"dtype": "<i1"}, msgpack.ExtType(5, b"x" * 100),
    msgpack.Timestamp(0),
]  # fmt: skip
OPTIONS = (
    "id", "head", "seed", "noise", "num_steps", "prompt", "rtc", "max_tokens", "temperature", "allow_loc",
    "patience_ms", "begins", "reported", "surprise",
)  # fmt: skip
OF_RTC = ("actions", "valid", "delay", "way", "maximum", "schedule", "end")
ENDLESS = [bytes([kind]) + b"\xff\xff\xff\xff" for kind in (0xDF, 0xDD, 0xC6, 0xDB, 0xC9)]  # maps, lists, bytes, texts
DEEP = [b"\x91" * 5000 + b"\xc0", b"\x81" * 2000, b"\x80" * 100_000]
RAW = [b"", b"\xc1", b"\xc0", b"\x93\x01\x02\x03", b"\xa5ab", *ENDLESS, *DEEP]
REQUEST = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


class Served:
    """ki-serve with a bundle, as a process of its own; `sound`: a question, and `wanted` what it is answered."""

    def __init__(self, bundle, folder):
        self.log = Path(folder) / "log"
        command = [sys.executable, "-m", "ki_runtime.serving.cli", str(bundle), "--port", "0", "--backend", "ort"]
        with self.log.open("wb") as words:
            self.process = subprocess.Popen(command, stderr=words, stdout=words)
        self.port = self._listens()
        self.content = observation(bundle)
        self.sound = pack({**self.content, "ki_edge": {"seed": 7, "id": "sound"}})
        self.wanted = None

    def _listens(self):
        until = time.monotonic() + 300
        while time.monotonic() < until and self.process.poll() is None:
            if (place := re.search(r"ws://127\.0\.0\.1:(\d+)", self.log.read_text("utf-8"))) is not None:
                return int(place[1])
            time.sleep(0.1)
        raise SystemExit(f"ki-serve does not listen: {self.log.read_text('utf-8')}")

    @property
    def memory(self):
        return sizes(f"/proc/{self.process.pid}/status").get("VmRSS", 0)

    def connect(self):
        socket_ = connect(f"ws://127.0.0.1:{self.port}", compression=None, max_size=None, open_timeout=LIMIT)
        socket_.recv(timeout=LIMIT)
        return socket_

    def check(self):
        """A sound question is answered as ever, and so is the health check."""
        with self.connect() as connection:
            connection.send(self.sound)
            actions = unpack(connection.recv(timeout=LIMIT), "the server")["actions"]
        if self.wanted is None:
            self.wanted = actions
        assert np.array_equal(actions, self.wanted), "a sound question got another answer than before"
        with socket.create_connection(("127.0.0.1", self.port), timeout=LIMIT) as plain:
            plain.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert plain.recv(12) == b"HTTP/1.1 200", "the server says that it is not well"

    def close(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


def observation(bundle):
    """Whatever fits the bundle's contract, under its own keys."""
    contract, noise = read_assets(Bundle.open(bundle)).contract, np.random.default_rng(0)
    shape = (*contract.image_size, 3)
    images = {camera.key: noise.integers(0, 256, shape, np.uint8) for camera in contract.cameras if camera.key}
    return {"images": images, "state": np.zeros(contract.state_dim, np.float32), "prompt": "go"}


def places(value, path=()):
    """Paths of all values inside a map."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    found = dict(value)
    found[path[0]] = replaced(value[path[0]], path[1:], new)
    return found


def wild_pack(value):
    """As `pack`, but of anything."""
    return msgpack.packb(
        value, default=lambda array: msgpack.unpackb(pack(array), strict_map_key=False), strict_types=False
    )


def mutated(content, rng):
    """(what kind of mutation, a frame)."""
    kind = rng.choice(["bytes", "cut", "value", "option", "rtc", "key", "raw", "text"])
    frame = pack({**content, "ki_edge": {"num_steps": 1}})
    if kind == "bytes":
        broken = bytearray(frame)
        for _ in range(rng.choice([1, 1, 2, 8])):
            broken[rng.randrange(min(len(broken), rng.choice([64, 400, len(broken)])))] = rng.randrange(256)
        return kind, bytes(broken)
    if kind == "cut":
        return kind, frame[: rng.randrange(len(frame))] + rng.choice([b"", b"\0" * 10])
    if kind == "value":
        return kind, wild_pack(replaced(content, rng.choice(list(places(content))), rng.choice(VALUES)))
    if kind == "option":
        options = {rng.choice(OPTIONS): rng.choice(VALUES) for _ in range(rng.choice([1, 1, 2, 3]))}
        return kind, wild_pack({**content, "ki_edge": options})
    if kind == "rtc":
        given = {"actions": np.zeros((3, 4)), "delay": 1, **{rng.choice(OF_RTC): rng.choice(VALUES)}}
        return kind, wild_pack({**content, "ki_edge": {"rtc": given, "num_steps": 1}})
    if kind == "key":
        name = rng.choice(["observation/state", "observation.state", "", "images", 3, b"x", "prompt", "ki_edge", None])
        return kind, wild_pack({**content, name: rng.choice(VALUES)})
    if kind == "raw":
        return kind, rng.choice(RAW) + bytes(rng.randrange(256) for _ in range(rng.choice([0, 0, 5, 50])))
    return kind, rng.choice(["", "{}", "x" * 100_000, "\x1b[2J"])


def send_frame(served, rng):
    """One mutated frame over a connection of its own: how it ended."""
    kind, frame = mutated(served.content, rng)
    with served.connect() as connection:
        try:
            connection.send(frame)
            answer = connection.recv(timeout=LIMIT)
        except ConnectionClosed:
            return kind, "cut off"
        if isinstance(answer, str):
            assert "Traceback" not in answer and "\n" not in answer, f"not one line: {answer[:300]}"
            return kind, "refused"
        found = unpack(answer, "the server")
        assert found.get("actions") is None or np.isfinite(found["actions"]).all(), "actions that are not finite"
        return kind, "answered"


def send_header(served, rng):
    """A mutated HTTP request, or a mutated websocket frame behind a sound one, over a plain socket."""
    request = bytearray(REQUEST)
    kind = rng.choice(["request", "frame", "long"])
    if kind == "request":
        for _ in range(rng.choice([1, 2, 8])):
            request[rng.randrange(len(request))] = rng.randrange(256)
    elif kind == "long":
        request = bytearray(
            b"GET /"
            + b"a" * rng.choice([100, 10_000, 200_000])
            + b" HTTP/1.1\r\n"
            + b"A: b\r\n" * rng.choice([1, 1000])
        )
    with socket.create_connection(("127.0.0.1", served.port), timeout=LIMIT) as plain:
        try:
            plain.sendall(bytes(request))
            if kind == "frame":
                plain.recv(4096)
                plain.sendall(bytes(rng.randrange(256) for _ in range(rng.choice([2, 14, 200]))))
            plain.shutdown(socket.SHUT_WR)
            while plain.recv(65536):
                pass
        except OSError:
            pass
    return f"header: {kind}", "ended"


def run_case(served, seed):
    """(kind, how it ended). AssertionError, TimeoutError for what must not be."""
    rng = random.Random(seed)
    return send_header(served, rng) if rng.random() < 0.15 else send_frame(served, rng)


def run(bundle, cases, seed, say=lambda line: None):
    """Counts of (kind, how it ended), and the growth of the server's memory in bytes."""
    counts = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        served = Served(bundle, folder)
        try:
            for _ in range(3):
                served.check()
            for number in range(min(cases, 300)):  # what it keeps once it has met everything
                run_case(served, f"{seed}-warm-{number}")
            before = served.memory
            for number in range(cases):
                counts[run_case(served, f"{seed}-{number}")] += 1
                if number % EVERY == EVERY - 1:
                    served.check()
                    say(f"{number + 1} cases, {served.memory / 2**20:.0f} MiB")
            served.check()
            grown = served.memory - before
            assert served.process.poll() is None, f"the server ended: {served.log.read_text('utf-8')[-2000:]}"
        finally:
            status = served.close()
        log = served.log.read_text("utf-8", errors="replace")
        assert status == 0, f"the server ended with {status}"
        assert "Traceback" not in log, log[-3000:]
    return counts, grown


def main():
    parser = argparse.ArgumentParser(description="Mutated frames for ki-serve.")
    parser.add_argument("bundle")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    begun = time.monotonic()
    counts, grown = run(given.bundle, given.cases, given.seed, say=lambda line: print(line, file=sys.stderr))  # noqa: T201
    for (kind, end), count in sorted(counts.items()):
        print(f"{kind:16} {end:10} {count}")  # noqa: T201
    print(f"{given.cases} cases in {time.monotonic() - begun:.0f} s; memory {grown / 2**20:+.1f} MiB")  # noqa: T201
    return 0 if grown <= GROWTH else 1


if __name__ == "__main__":
    sys.exit(main())
