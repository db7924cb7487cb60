"""Robots that ask, servers that answer: a queue as a small simulation of events, and the formulas that it is held to.

Times are seconds. `simulate` gives how long every request took, from when it was there until its answer was: first
come, first served, by whichever server is free, which takes along what waits, up to its largest batch.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Seconds = npt.NDArray[np.float64]
Service = Callable[[int], float]  # requests in a batch -> seconds


def simulate(arrivals: Seconds, service: Service, servers: int, largest: int = 1) -> Seconds:
    """Seconds from each arrival (sorted) to its answer."""
    times = arrivals.tolist()
    took = np.empty(len(times))
    free = [0.0] * servers
    first = 0
    while first < len(times):
        start = max(free[0], times[first])
        after = first + 1
        while after < len(times) and after - first < largest and times[after] <= start:
            after += 1
        done = start + service(after - first)
        took[first:after] = done - arrivals[first:after]
        heapq.heapreplace(free, done)
        first = after
    return took


def poisson(rate: float, count: int, seed: int) -> Seconds:
    """Arrivals of very many sources that know nothing of each other: `rate` a second in all."""
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))


def periodic(robots: int, period: float, jitter: float, cycles: int, seed: int, together: bool = False) -> Seconds:
    """Arrivals of robots that ask every `period`, each since a moment of its own (or all `together`), give or take a
    normally distributed `jitter`; row by row of a matrix [cycles, robots], not sorted.
    """
    random = np.random.default_rng(seed)
    phase = np.zeros(robots) if together else random.uniform(0, period, robots)
    ticks = period * (1 + np.arange(cycles))[:, None] + phase + random.normal(0, jitter, (cycles, robots))
    return np.maximum(ticks, 0.0)


def exponential(mean: float, seed: int) -> Service:
    """A service time that is as random as one can be."""
    random = np.random.default_rng(seed)
    return lambda _: float(random.exponential(mean))


def varying(mean: float, variation: float, seed: int) -> Service:
    """Gamma distributed with this mean and this standard deviation over mean; 0: always the same."""
    if variation == 0:
        return lambda _: mean
    random, shape = np.random.default_rng(seed), 1 / variation**2
    return lambda _: float(random.gamma(shape, mean / shape))


def erlang_c(servers: int, load: float) -> float:
    """The share of requests that wait in M/M/c; `load` = rate x mean service time, below `servers`."""
    blocked = 1.0  # Erlang B, by its recurrence
    for n in range(1, servers + 1):
        blocked = load * blocked / (n + load * blocked)
    return blocked / (1 - load / servers * (1 - blocked))


def mmc_wait(servers: int, rate: float, mean: float) -> float:
    """Mean wait in M/M/c."""
    return erlang_c(servers, rate * mean) / (servers / mean - rate)


def mmc_waits_longer(servers: int, rate: float, mean: float, seconds: float) -> float:
    """The share of requests that wait longer than this in M/M/c."""
    return erlang_c(servers, rate * mean) * math.exp(-(servers / mean - rate) * seconds)


def mg1_wait(rate: float, mean: float, variation: float) -> float:
    """Mean wait in M/G/1 (Pollaczek and Khinchine); `variation`: standard deviation of the service time over mean."""
    return rate * mean**2 * (1 + variation**2) / 2 / (1 - rate * mean)


def allen_cunneen(servers: int, rate: float, mean: float, variation: float) -> float:
    """Mean wait in M/G/c, nearly: that of M/M/c, less the part that the variation of the service time makes."""
    return mmc_wait(servers, rate, mean) * (1 + variation**2) / 2


def percentile(values: Seconds, share: float) -> float:
    """Without the first fifth, in which the queue fills."""
    return float(np.percentile(values[len(values) // 5 :], share))


def least_servers(fits: Callable[[int], bool], least: int) -> int:
    """The smallest number, from `least` on, that fits, where any larger one fits too."""
    most, step = least, 1
    while not fits(most):
        least, most, step = most + 1, most + step, 2 * step
    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if fits(middle) else (middle + 1, most)
    return most
