"""Answers a second of a policy in replicas on Ray, against one thread of this process.

    python benchmarks/ray_replicas.py BUNDLE --replicas 1,2 --steps 10,100

Needs ki-edge[ray]. One engine after the other in every round, each with as many questions at once as it has replicas;
of each the best round counts, and its median is told, since other programs may run. With more denoising steps an
inference is longer, as those of large policies are. Every replica computes on one CPU thread.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
from boards import markdown

from ki_runtime import Policy
from ki_runtime.serving import LocalEngine, Question
from ki_runtime.serving.ray_cluster import STORE
from ki_runtime.serving.ray_engine import RayEngine
from ki_runtime.serving.ray_options import RayOptions


def question(policy: Policy, steps: int) -> Question:
    contract, random = policy.contract, np.random.default_rng(0)
    pictures = {c.key: random.integers(0, 256, (*contract.image_size, 3), np.uint8) for c in contract.cameras if c.key}
    state = policy.stats["state"].mean if "state" in policy.stats else np.zeros(contract.state_dim)
    observation = {"images": pictures, "state": np.asarray(state, np.float32)[: contract.state_dim], "prompt": "reach"}
    return Question(observation, arguments={"seed": 0, "num_steps": steps})


async def asked(engine: Any, at_once: int, asking: Question, seconds: float) -> tuple[float, float, float]:
    """(answers a second, median milliseconds of one, of them in the policy)."""
    took: list[float] = []
    inside: list[float] = []
    end = time.perf_counter() + seconds

    async def robot() -> None:
        while time.perf_counter() < end:
            start = time.perf_counter()
            (answer,) = await engine.answer([asking])
            if isinstance(answer, Exception):
                raise answer
            took.append(time.perf_counter() - start)
            inside.append(answer["timing"]["total_ms"])

    start = time.perf_counter()
    await asyncio.gather(*(robot() for _ in range(at_once)))
    return len(took) / (time.perf_counter() - start), 1e3 * float(np.median(took)), float(np.median(inside))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--replicas", default="1,2")
    parser.add_argument("--steps", default="10,100")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=1.5)
    given = parser.parse_args()
    replicas = [int(word) for word in given.replicas.split(",")]
    policy = Policy.load(given.bundle, "ort", threads=1)
    policy.warm_up()
    ray.init(
        "local", num_cpus=1 + sum(replicas), object_store_memory=STORE, include_dashboard=False, log_to_driver=False
    )
    engines: dict[int, Any] = {0: LocalEngine(policy)}
    for count in replicas:
        options = RayOptions(least=count, most=count, backend="ort", application=f"of-{count}")
        engines[count] = RayEngine(given.bundle, options)
    asking = {steps: question(policy, steps) for steps in map(int, given.steps.split(","))}
    found: dict[tuple[int, int], list[tuple[float, float, float]]] = {}
    for turn in range(given.rounds + 1):
        for steps in asking:
            for count, engine in engines.items():
                one = asyncio.run(asked(engine, max(1, count), asking[steps], given.seconds))
                if turn:  # the first one warms up
                    found.setdefault((steps, count), []).append(one)
    rows = []
    for (steps, count), rounds in sorted(found.items()):
        name = f"{count} replica{'s' if count > 1 else ''} on Ray" if count else "one thread, without Ray"
        rate, took, inside = max(rounds)
        middle = f"{np.median([one[0] for one in rounds]):.1f}"
        rows.append([name, steps, f"{rate:.1f}", middle, f"{took:.1f}", f"{inside:.1f}"])
    head = ["", "denoising steps", "answers a second", "median round", "median ms", "of them in the policy"]
    print("\n".join(markdown(head, [[str(cell) for cell in row] for row in rows])))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
