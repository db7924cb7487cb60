"""Measuring several things fairly: a warm-up each, then rounds in which each runs once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Times = Mapping[str, float]  # milliseconds by stage
Contender = Callable[[], Times]
Say = Callable[[str], object]

AGREE = 0.05
LEAST = 2
PAUSE_S = 0.1  # before each measurement: the threads of the engine before it stop spinning


@dataclass(frozen=True)
class WarmUp:
    """How often a contender ran before it was measured, and whether its times had settled."""

    runs: int
    settled: bool


@dataclass(frozen=True)
class Spread:
    """Percentiles in milliseconds over `runs` measurements; with few of them p99 is their maximum."""

    p50: float
    p90: float
    p99: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Percentiles of at least one value, linear between neighbours."""
        p50, p90, p99 = np.percentile(values, (50, 90, 99))
        return cls(float(p50), float(p90), float(p99), len(values))


@dataclass(frozen=True)
class Samples:
    """Times of one contender: milliseconds by stage, one value a round."""

    times: Mapping[str, Sequence[float]]
    warm_up: WarmUp

    def p50(self, stage: str) -> float:
        """Median of a stage, in milliseconds."""
        return float(np.median(self.times[stage]))


def policy(seconds: float) -> str:
    """The warm-up policy in words."""
    return (
        f"each at least {LEAST} runs and until the medians of all runs before and after the last agree within "
        f"{100 * AGREE:.0f} %, at most {seconds:g} s"
    )


def measure(contenders: Mapping[str, Contender], rounds: int, warm_up_s: float, say: Say) -> dict[str, Samples]:
    """Warm each contender up, then run all of them in turn, `rounds` times."""
    warm = {name: _warm_up(run, warm_up_s) for name, run in contenders.items()}
    found: dict[str, list[Times]] = {name: [] for name in contenders}
    for index in range(rounds):
        for name, run in contenders.items():
            time.sleep(PAUSE_S)
            found[name].append(run())
        say(f"round {index + 1} of {rounds}")
    return {
        name: Samples({stage: [times[stage] for times in runs] for stage in runs[0]}, warm[name])
        for name, runs in found.items()
    }


def _warm_up(run: Contender, seconds: float) -> WarmUp:
    end, taken = time.perf_counter() + seconds, list[float]()
    for took in _durations(run):
        taken.append(took)
        if len(taken) < LEAST:
            continue
        before, after = np.median(taken[:-1]), np.median(taken)
        if abs(after - before) <= AGREE * after:
            return WarmUp(len(taken), True)
        if time.perf_counter() > end:
            break
    return WarmUp(len(taken), False)


def _durations(run: Contender) -> Iterator[float]:
    while True:
        start = time.perf_counter()
        run()
        yield time.perf_counter() - start
