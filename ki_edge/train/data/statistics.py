"""Statistics of millions of rows in a fixed amount of memory, with exact quantiles.

A float32's bits, read as a whole number, have its order. So two passes find a value by its rank: the first counts the
upper 16 bits of all numbers, the second the lower 16 bits of those that share the upper half of the one that is sought.
`meta/stats.json` is not used: its quantiles over several episodes are envelopes, and the frames are read anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ki_edge.errors import DatasetError
from ki_edge.policy.normalize import NormStats

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
UInt32 = npt.NDArray[np.uint32]
Blocks = Callable[[], Iterable[Float32]]  # goes over all rows once, in blocks [n,d]
QUANTILES = (0.01, 0.99)
HALF, LOW = 16, 0xFFFF
BLOCK = 65_536  # rows
FAR = 1000.0  # normalised: beyond it a number is said to be far outside
NOISE = 1e-7  # of the largest movement among a feature's numbers: one that moves less is told


@dataclass(frozen=True, eq=False)
class Measured:
    """`stats` of a feature, f64 [d] each, and its extremes `low`, `high` f64 [d]; `notes`: what is odd, a line each."""

    stats: NormStats
    low: Float64
    high: Float64
    rows: int
    notes: tuple[str, ...]


def measure(blocks: Blocks, what: str, names: tuple[str, ...] = ()) -> Measured:
    """Mean, population std and the 1 % and 99 % quantiles (numpy's, linear between ranks) over all rows.

    `what` names the feature in messages, `names` its numbers. A number that never moves is told; one whose quantiles
    are equal although it moves gets its extremes instead, or its moves would be normalised to millions.
    DatasetError for no rows, and numbers that are not finite.
    """
    rows, mean, spread, low, high = _moments(blocks, what)
    q01, q99 = _quantiles(blocks, rows, QUANTILES)
    notes = []
    for at in np.flatnonzero(q01 == q99):
        name = f"{what}[{at}]" + (f" ({names[at]})" if at < len(names) else "")
        if low[at] == high[at]:
            notes.append(f"{name} is {low[at]:.6g} in every frame: its range is zero, so nothing is learnt about it")
        else:
            q01[at], q99[at] = low[at], high[at]
            notes.append(
                f"{name} is the same in 98 of 100 frames: its range is taken from {low[at]:.6g} to {high[at]:.6g}, not "
                "between quantiles"
            )
    span = q99 - q01
    for at in np.flatnonzero((span > 0) & (span <= NOISE * span.max())):
        name = f"{what}[{at}]" + (f" ({names[at]})" if at < len(names) else "")
        notes.append(
            f"{name} moves by {span[at]:.3g}, others by up to {span.max():.3g}: if that is noise, it is learnt as "
            "movement, and a --map FILE without it is better"
        )
    width = q99 - q01 + 1e-6
    outside = np.maximum(q01 - low, high - q99) / width * 2
    for at in np.flatnonzero(outside > FAR):
        name = f"{what}[{at}]" + (f" ({names[at]})" if at < len(names) else "")
        notes.append(
            f"{name} goes from {low[at]:.6g} to {high[at]:.6g}, 98 of 100 values lie between {q01[at]:.6g} and "
            f"{q99[at]:.6g}: look for outliers"
        )
    return Measured(NormStats(mean, np.sqrt(spread), q01, q99), low, high, rows, tuple(notes))


def _moments(blocks: Blocks, what: str) -> tuple[int, Float64, Float64, Float64, Float64]:
    """Rows, mean, variance (over blocks: Chan et al. 1979), lowest and highest."""
    rows, mean, squares, low, high = 0, np.zeros(0), np.zeros(0), np.zeros(0), np.zeros(0)
    for block in blocks():
        if not len(block):
            continue
        if (bad := np.argwhere(~np.isfinite(block))).size:
            raise DatasetError(f"{what}[{bad[0][1]}] is {block[tuple(bad[0])]}: statistics need finite numbers")
        each = block.astype(np.float64)
        center = each.mean(axis=0)
        around = ((each - center) ** 2).sum(axis=0)
        if rows == 0:
            rows, mean, squares, low, high = len(each), center, around, each.min(axis=0), each.max(axis=0)
            continue
        total, shift = rows + len(each), center - mean
        squares += around + shift**2 * (rows * len(each) / total)
        mean += shift * (len(each) / total)
        low, high, rows = np.minimum(low, each.min(axis=0)), np.maximum(high, each.max(axis=0)), total
    if not rows:
        raise DatasetError(f"{what}: no rows to measure")
    return rows, mean, squares / rows, low, high


def _quantiles(blocks: Blocks, rows: int, quantiles: tuple[float, ...]) -> list[Float64]:
    places = [(rows - 1) * quantile for quantile in quantiles]
    ranks = sorted({rank for place in places for rank in (int(place), min(int(place) + 1, rows - 1))})
    values = dict(zip(ranks, _ranked(blocks, ranks), strict=True))
    found = []
    for place in places:
        below, part = int(place), place - int(place)
        low, high = values[below], values[min(below + 1, rows - 1)]
        # numpy's: from the nearer side
        found.append(low + (high - low) * part if part < 0.5 else high - (high - low) * (1 - part))
    return found


def _ranked(blocks: Blocks, ranks: list[int]) -> list[Float64]:
    """The values of these ranks of each dimension, f64 [d] each."""
    upper: npt.NDArray[np.int64] | None = None
    for block in blocks():
        upper_keys = _ordered(block) >> HALF
        upper = np.zeros((block.shape[1], LOW + 1), np.int64) if upper is None else upper
        for at in range(block.shape[1]):
            upper[at] += np.bincount(upper_keys[:, at], minlength=LOW + 1)
    assert upper is not None
    below = np.cumsum(upper, axis=1)
    halves = np.array([[int(np.searchsorted(below[at], rank, "right")) for rank in ranks] for at in range(len(upper))])
    lower = {(at, half): np.zeros(LOW + 1, np.int64) for at in range(len(upper)) for half in halves[at]}
    for block in blocks():
        keys = _ordered(block)
        for (at, half), counts in lower.items():
            own = keys[:, at]
            counts += np.bincount(own[own >> HALF == half] & LOW, minlength=LOW + 1)
    found = []
    for number, rank in enumerate(ranks):
        value = np.zeros(len(upper), np.uint32)
        for at in range(len(upper)):
            half = int(halves[at, number])
            before = below[at, half] - upper[at, half]
            value[at] = half << HALF | int(np.searchsorted(np.cumsum(lower[at, half]), rank - before, "right"))
        found.append(_number(value).astype(np.float64))
    return found


def _ordered(block: Float32) -> UInt32:
    """Whole numbers in the order of these floats; -0 counts as 0."""
    bits = np.ascontiguousarray(block + np.float32(0), np.float32).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.uint32)


def _number(keys: UInt32) -> Float32:
    """Inverse of `_ordered`."""
    bits = np.where(keys >> 31, keys & np.uint32(0x7FFFFFFF), ~keys).astype(np.uint32)
    return bits.view(np.float32)
