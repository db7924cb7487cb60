"""Samples a second of the loader, by workers and with and without a cache.

    python benchmarks/loader.py DATASET [--map FILE]

A table for `benchmarks/train.py` too: `measure` gives its rows. The first epoch fills the cache, the second reads it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ki_edge.config import PRESETS
from ki_edge.planning.settings import TrainSettings
from ki_edge.train.data.mixed import MixedData
from ki_edge.train.data.opening import open_data
from ki_edge.train.data.start import Start
from ki_edge.train.step.training_data import Share

SECONDS = 10.0  # of each measurement at most


@dataclass(frozen=True)
class Row:
    """`workers`, where pictures come from, and samples a second, without the first batch (workers start meanwhile)."""

    workers: int
    pictures: str
    samples_per_s: float


def measure(
    dataset: str, preset: str, batch: int, workers: Sequence[int], *, map_file: Path | None = None, horizon: int = 8
) -> list[Row]:
    """The rows of a dataset, for pictures of a preset's size."""
    start = Start.from_nothing(PRESETS[preset])
    settings = TrainSettings(steps=1_000_000, batch=batch)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for cache in (None, Path(folder)):
            data = open_data([dataset], start, settings, horizon=horizon, map_file=map_file, cache=cache, workers=0)
            frames = int(data.facts()[f"data.{data.names[0]}.frames"])
            if cache is not None:
                data.workers = max(workers)
                rows.append(Row(max(workers), "decoded and kept", _rate(data, frames)))
            for count in workers:
                data.workers = count
                rows.append(Row(count, "decoded" if cache is None else "from the cache", _rate(data, frames)))
            data.close()
    return rows


def _rate(data: MixedData, most: int) -> float:
    """Over at most so many samples, or SECONDS if those were enough for some."""
    steps = data.steps(0, Share())
    next(steps)
    began, taken = time.perf_counter(), 0
    while taken < most and (not taken or time.perf_counter() - began < SECONDS):
        taken += sum(len(part) for part in next(steps))
    steps.close()  # type: ignore[attr-defined]
    return taken / (time.perf_counter() - began)


def main() -> None:
    """The table, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    parser.add_argument("--map", type=Path)
    parser.add_argument("--preset", default="base")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    print("| pictures | workers | samples/s |\n|---|---|---|")
    for row in measure(given.dataset, given.preset, given.batch, given.workers, map_file=given.map):
        print(f"| {row.pictures} | {row.workers} | {row.samples_per_s:.0f} |")


if __name__ == "__main__":
    main()
