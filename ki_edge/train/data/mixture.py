"""Which samples a step takes: a function of the seed and the step alone, so that a run can go on anywhere.

How many rows of a step come from a dataset follows from its weight, and is that weight's share of the batch up to one.
Each dataset is gone through in an order of its own that is new in every epoch, each sample once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
BLOCK = 1024  # steps whose counts are drawn at once
ROUNDS = 6
COUNTS, ORDER, ROWS = 11, 12, 13  # tell the random numbers of one purpose from another's


@dataclass(frozen=True)
class Plan:
    """Of the rows of a step: source, its sample's number, and how often that has been gone through before, i64 [n]."""

    source: Int64
    sample: Int64
    epoch: Int64


class Mixture:
    """`sizes`: samples of each dataset; `weights`: shares of a batch, of any sum; `batch`: rows of a step."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], batch: int, seed: int) -> None:
        share = np.asarray(weights, np.float64)
        self._edges = np.concatenate([[0.0], np.cumsum(share / share.sum())])
        self._edges[-1] = 1.0
        self.sizes, self.batch, self.seed = np.asarray(sizes, np.int64), batch, seed
        self._last: tuple[int, Int64] = (-1, np.zeros((0, 0), np.int64))  # a block and its counts
        self._before = [np.zeros(len(self.sizes), np.int64)]  # rows of each source before each block

    @property
    def shares(self) -> npt.NDArray[np.float64]:
        """The share of every batch that each dataset has."""
        return np.diff(self._edges)

    def plan(self, step: int) -> Plan:
        """The rows of a step's batch, in their order."""
        block, within = divmod(step, BLOCK)
        if self._last[0] != block:
            self._last = (block, self._counts(block))
        counts = self._last[1]
        taken = self._before_block(block) + counts[:within].sum(axis=0)
        own = counts[within]
        source = np.repeat(np.arange(len(own)), own)
        number = np.concatenate([np.arange(first, first + count) for first, count in zip(taken, own, strict=True)])
        epoch, place = np.divmod(number, self.sizes[source])
        sample = np.empty_like(place)
        for at in np.flatnonzero(own):
            rows = np.flatnonzero(source == at)
            for pass_ in np.unique(epoch[rows]):
                some = rows[epoch[rows] == pass_]
                sample[some] = shuffled(place[some], int(self.sizes[at]), (self.seed, ORDER, int(at), int(pass_)))
        order = np.random.default_rng((self.seed, ROWS, step)).permutation(self.batch)
        return Plan(source[order], sample[order], epoch[order])

    def _counts(self, block: int) -> Int64:
        """Rows of each source in the steps of a block, i64 [BLOCK,S]: the points (k + u) / batch between its edges."""
        u = np.random.default_rng((self.seed, COUNTS, block)).random((BLOCK, 1))
        below = np.ceil(self.batch * self._edges[None] - u).astype(np.int64).clip(0, self.batch)
        below[:, 0], below[:, -1] = 0, self.batch
        return np.diff(below, axis=1)

    def _before_block(self, block: int) -> Int64:
        while len(self._before) <= block:
            self._before.append(self._before[-1] + self._counts(len(self._before) - 1).sum(axis=0))
        return self._before[block]


def shuffled(places: Int64, size: int, key: tuple[int, ...]) -> Int64:
    """Where each place of 0..size-1 goes in a random order of them: no two to the same, and no list of all is made.

    A Feistel network over the next power of four, walked again from places that lie beyond the size.
    """
    if size <= 1:
        return np.zeros_like(places)
    half = max(1, (int(size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.random.default_rng(key).integers(0, 1 << 63, ROUNDS, np.int64).astype(np.uint64)
    found = places.astype(np.uint64)
    beyond: npt.NDArray[np.bool_] = np.ones(len(found), np.bool_)
    while beyond.any():
        found[beyond] = _feistel(found[beyond], half, mask, keys)
        beyond = found >= np.uint64(size)
    return found.astype(np.int64)


def _feistel(value: UInt64, half: int, mask: np.uint64, keys: UInt64) -> UInt64:
    left, right = value >> np.uint64(half), value & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) & mask)
    return (left << np.uint64(half)) | right


def _mixed(value: UInt64) -> UInt64:
    """The finaliser of splitmix64: each bit of the result depends on all of the value's."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
