"""Whether requests that wait are faster together, measured on this machine before the first of them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from ki_edge.errors import BackendError
from ki_runtime.policy.rows import Question
from ki_runtime.policy.warming import blank_observation

ROUNDS = 2  # of which the faster counts: the first one of a size allocates and compiles
WORTH = 0.9  # of the time that the same requests take in smaller batches; else they wait for each other in vain


@dataclass(frozen=True)
class Batching:
    """`largest`: requests that run at once at most. `text`: what was measured."""

    largest: int
    text: str


def measure_batching(policy: Any, most: int, prompt: str | None = None) -> Batching:
    """The largest batch, of at most `most` requests, up to which each doubling makes the single request faster."""
    if most == 1:
        return Batching(1, "requests run one after the other (--max-batch 1)")
    if not hasattr(policy, "infer_many"):
        return Batching(1, "requests run one after the other: this policy takes one at a time")
    blank = blank_observation(policy.contract, prompt)
    largest, times = 1, {1: _milliseconds(policy, blank, 1)}
    why = ""
    while largest < most:
        count = min(2 * largest, most)
        try:
            times[count] = _milliseconds(policy, blank, count)
        except BackendError as error:  # its memory does not suffice
            why = f"; {count} at once: {error}"
            break
        if times[count] / count > WORTH * times[largest] / largest:
            break
        largest = count
    said = ", ".join(f"{count}: {took:.0f} ms" for count, took in times.items())
    how = f"up to {largest} requests run at once" if largest > 1 else "requests run one after the other"
    return Batching(largest, f"{how} ({said}{why})")


def _milliseconds(policy: Any, observation: Any, count: int) -> float:
    """So many requests at once; BackendError if one of them fails."""
    took = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        answers = policy.infer_many([Question(observation, seed=number) for number in range(count)])
        took.append(1e3 * (time.perf_counter() - start))
        for answer in answers:
            if isinstance(answer, Exception):
                raise BackendError(f"a batch of {count} failed: {answer}") from answer
    return min(took)
