"""Robots that ask a policy server as fast as it answers, or its health check; a process of its own for serving.py.

    python benchmarks/serving_clients.py URI BUNDLE --clients 8 --seconds 60
    python benchmarks/serving_clients.py URI --health --seconds 60

Prints one JSON object. Each client asks anew when it has its answer, with the same frame each time, so that what is
measured is the server; an answer is looked into only for whether it is one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import sys
import time
from urllib.parse import urlsplit

import numpy as np

PATIENCE = 120.0  # seconds for an answer
BETWEEN = 0.02  # seconds between two looks at the health check


def main() -> int:
    """Exit status 0; 1 where nothing was answered."""
    parser = argparse.ArgumentParser(description="Load for a policy server.")
    parser.add_argument("uri")
    parser.add_argument("bundle", nargs="?", help="whose contract the observations follow")
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--health", action="store_true")
    given = parser.parse_args()
    found = health(given.uri, given.seconds) if given.health else asyncio.run(load(given))
    print(json.dumps(found))
    return 0 if found["count"] else 1


async def load(given: argparse.Namespace) -> dict[str, object]:
    """All clients for so many seconds; milliseconds of their answers."""
    frame = question(given.bundle)
    begin = asyncio.Event()
    until = [0.0]
    tasks = [asyncio.create_task(client(given.uri, frame, begin, until)) for _ in range(given.clients)]
    await asyncio.sleep(1.0 + 0.02 * given.clients)  # for the connections
    started = time.perf_counter()
    until[0] = started + given.seconds
    begin.set()
    results = await asyncio.gather(*tasks)
    took = time.perf_counter() - started
    times = np.array([value for own, _ in results for value in own])
    counts = [len(own) for own, _ in results]
    return {
        "count": len(times),
        "errors": sum(failed for _, failed in results),
        "per_second": len(times) / took,
        **percentiles(times),
        "fairness": max(counts) / max(1, min(counts)),
    }


async def client(uri: str, frame: bytes, begin: asyncio.Event, until: list[float]) -> tuple[list[float], int]:
    """(milliseconds of each answer, how often there was none)."""
    from websockets.asyncio.client import connect

    times: list[float] = []
    failed = 0
    async with connect(uri, compression=None, max_size=None, ping_interval=None, open_timeout=PATIENCE) as socket:
        await socket.recv()
        await begin.wait()
        while (start := time.perf_counter()) < until[0]:
            await socket.send(frame)
            answer = await asyncio.wait_for(socket.recv(), PATIENCE)
            if isinstance(answer, str) or b"actions" not in answer:
                failed += 1
                await asyncio.sleep(0.05)
            else:
                times.append(1e3 * (time.perf_counter() - start))
    return times, failed


def question(bundle: str) -> bytes:
    """A frame with an observation of the bundle's contract: noise for pictures, a state within its training range."""
    from ki_edge.bundle import Bundle
    from ki_runtime.policy.policy import read_assets
    from ki_runtime.remote.packing import pack
    from ki_runtime.remote.policy import outgoing

    assets = read_assets(Bundle.open(bundle))
    contract, random = assets.contract, np.random.default_rng(os.getpid())
    shape = (*contract.image_size, 3)
    keys = [camera.key for camera in contract.cameras if camera.key is not None]
    pictures = {f"observation.images.{key}": random.integers(0, 256, shape, np.uint8) for key in keys}
    stats = assets.stats.get("state")
    middle = np.zeros(contract.state_dim) if stats is None else (np.asarray(stats.q01) + np.asarray(stats.q99)) / 2
    state = middle[: contract.state_dim].astype(np.float32)
    prompt = contract.default_prompt or "reach the target"
    return pack(outgoing(contract, {**pictures, "observation.state": state, "prompt": prompt}))


def health(uri: str, seconds: float) -> dict[str, object]:
    """Look at /healthz fifty times a second, each time over a connection of its own."""
    place = urlsplit(uri)
    times, failed, until = [], 0, time.perf_counter() + seconds
    while (start := time.perf_counter()) < until:
        connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=PATIENCE)
        try:
            connection.request("GET", "/healthz")
            if connection.getresponse().read() != b"OK\n":
                failed += 1
            times.append(1e3 * (time.perf_counter() - start))
        except (OSError, http.client.HTTPException):
            failed += 1
        finally:
            connection.close()
        with contextlib.suppress(ValueError):
            time.sleep(BETWEEN - (time.perf_counter() - start))
    return {"count": len(times), "errors": failed, **percentiles(np.array(times))}


def percentiles(times: np.ndarray) -> dict[str, float]:
    """p50, p99 and the largest."""
    if not len(times):
        return dict.fromkeys(("p50", "p99", "max"), float("nan"))
    p50, p99 = np.percentile(times, [50, 99])
    return {"p50": float(p50), "p99": float(p99), "max": float(times.max())}


if __name__ == "__main__":
    sys.exit(main())
