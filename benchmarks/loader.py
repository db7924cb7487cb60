"""Samples a second of the loader, by workers and with and without a cache: python benchmarks/loader.py DATASET [--map FILE].

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
from ki_edge.train.data.opening import open_data
from ki_edge.train.data.start import Start
from ki_edge.train.step.settings import TrainSettings
from ki_edge.train.step.training_data import Share

SECONDS = 20.0  # of each measurement at most


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
        for cache, name in ((None, "decoded"), (Path(folder), "decoded and kept"), (Path(folder), "from the cache")):
            for count in workers if name != "decoded and kept" else [max(workers)]:
                data = open_data(
                    [dataset], start, settings, horizon=horizon, map_file=map_file, cache=cache, workers=count
                )  # fmt: skip
                steps = data.steps(0, Share())
                next(steps)
                epoch = -(-data.facts()[f"data.{data.names[0]}.frames"] // batch)
                began, taken = time.perf_counter(), 0
                while time.perf_counter() - began < SECONDS and taken < epoch * batch:
                    taken += sum(len(part) for part in next(steps))
                rows.append(Row(count, name, taken / (time.perf_counter() - began)))
                data.close()
    return rows


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
