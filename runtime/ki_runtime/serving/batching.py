"""Whether requests that wait are faster together, measured on this machine before the first of them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from ki_edge.errors import BackendError
from ki_runtime.policy.rows import Question
from ki_runtime.policy.warming import blank_observation

ROUNDS = 7  # of two sizes in turn, of which the fastest of each counts: what else the machine does makes some slow
FEWEST, ENOUGH = 3, 5.0  # rounds in any case, and seconds after which no more are begun
WORTH = 0.85  # of the time that the same requests take in smaller batches; else they wait for each other in vain


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
    largest, times, why = 1, {1: _milliseconds(policy, blank, 1)}, ""
    while largest < most:
        count = min(2 * largest, most)
        try:
            times |= _in_turn(policy, blank, largest, count)
        except BackendError as error:  # its memory does not suffice
            why = f"; {count} at once: {error}"
            break
        if times[count] / count > WORTH * times[largest] / largest:
            break
        largest = count
    said = ", ".join(f"{count}: {took:.0f} ms" for count, took in times.items())
    how = f"up to {largest} requests run at once" if largest > 1 else "requests run one after the other"
    return Batching(largest, f"{how} ({said}{why})")


def _in_turn(policy: Any, observation: Any, *counts: int) -> dict[int, float]:
    """Milliseconds of batches of these sizes. They take turns, so that a busy moment meets all of them."""
    _milliseconds(policy, observation, counts[-1])  # the first one of a size allocates and compiles
    found: dict[int, float] = dict.fromkeys(counts, float("inf"))
    begun = time.perf_counter()
    for number in range(ROUNDS):
        if number >= FEWEST and time.perf_counter() - begun > ENOUGH:
            break
        for count in counts:
            found[count] = min(found[count], _milliseconds(policy, observation, count))
    return found


def _milliseconds(policy: Any, observation: Any, count: int) -> float:
    """Of so many requests at once; BackendError if one of them fails."""
    start = time.perf_counter()
    answers = policy.infer_many([Question(observation, seed=number) for number in range(count)])
    took = 1e3 * (time.perf_counter() - start)
    for answer in answers:
        if isinstance(answer, Exception):
            raise BackendError(f"a batch of {count} failed: {answer}") from answer
    return took
