"""Statistics of recorded features, as a LeRobotDataset keeps them: of each episode, and of all of them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Stats = dict[str, npt.NDArray[Any]]  # min, max, mean, std, q01 ... q99, all of one shape, and count [1]
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
EVERY = 8  # of the pictures, so many are counted once
PIXELS = 150  # along each side of a picture that is counted, about


def column_stats(values: npt.NDArray[Any]) -> Stats:
    """Of a column [n] or [n, d], n at least 1: statistics [1] or [d]."""
    rows = values.reshape(len(values), -1).astype(np.float64)
    found: Stats = {
        "min": rows.min(axis=0),
        "max": rows.max(axis=0),
        "mean": rows.mean(axis=0),
        "std": rows.std(axis=0),
        "count": np.array([len(rows)]),
    }
    quantiles = np.quantile(rows, list(QUANTILES.values()), axis=0)
    return found | dict(zip(QUANTILES, quantiles, strict=True))


class PictureStats:
    """Counts the grey levels of a camera's pictures: of some of them, of some of their pixels; all exact for those."""

    def __init__(self) -> None:
        self._seen = self._counted = 0
        self._levels = np.zeros((3, 256), np.int64)

    def add(self, picture: npt.NDArray[np.uint8]) -> None:
        """A picture RGB u8 [h, w, 3]."""
        self._seen += 1
        if self._seen % EVERY != 1:
            return
        self._counted += 1
        step = max(1, max(picture.shape) // PIXELS)
        few = picture[::step, ::step]
        for channel in range(3):
            self._levels[channel] += np.bincount(few[..., channel].ravel(), minlength=256)

    def stats(self) -> Stats:
        """Statistics [3, 1, 1] of values in 0..1; `count` is that of the pictures."""
        values, total = np.arange(256) / 255.0, self._levels.sum(axis=1)
        mean = self._levels @ values / total
        found = {
            "min": np.array([values[np.flatnonzero(row)[0]] for row in self._levels]),
            "max": np.array([values[np.flatnonzero(row)[-1]] for row in self._levels]),
            "mean": mean,
            "std": np.sqrt(np.maximum(self._levels @ values**2 / total - mean**2, 0.0)),
        }
        below = np.cumsum(self._levels, axis=1)
        for name, share in QUANTILES.items():
            found[name] = values[(below < share * total[:, None]).sum(axis=1)]
        shaped: Stats = {name: value.reshape(3, 1, 1) for name, value in found.items()}
        return shaped | {"count": np.array([self._counted])}


def together(stats: Sequence[Mapping[str, Stats]]) -> dict[str, Stats]:
    """Statistics of several episodes as one: exact but for the quantiles, which are means weighted by the counts.

    LeRobot's rule. Exact quantiles would need all the numbers of all episodes.
    """
    return {name: _joined([one[name] for one in stats]) for name in stats[0]}


def _joined(stats: Sequence[Stats]) -> Stats:
    counts = np.stack([one["count"].reshape((1,) * one["mean"].ndim) for one in stats]).astype(np.float64)
    total = counts.sum(axis=0)

    def weighted(values: Float64) -> Float64:
        return np.asarray((values * counts).sum(axis=0) / total)

    means = np.stack([one["mean"] for one in stats])
    mean = weighted(means)
    variance = weighted(np.stack([one["std"] ** 2 for one in stats]) + (means - mean) ** 2)
    return {
        "min": np.min([one["min"] for one in stats], axis=0),
        "max": np.max([one["max"] for one in stats], axis=0),
        "mean": mean,
        "std": np.sqrt(variance),
        "count": np.sum([one["count"] for one in stats], axis=0),
        **{name: weighted(np.stack([one[name] for one in stats])) for name in QUANTILES},
    }
