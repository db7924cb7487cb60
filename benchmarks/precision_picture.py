"""Success against size, one mark for each precision: the picture of `benchmarks/precision.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from precision_measures import Row

mpl.use("agg")
import matplotlib.pyplot as plt


def draw(rows: Sequence[Row], path: Path) -> None:
    """A PNG: success with its interval, or where nobody measured that the error, over the weights that acting needs."""
    shown = [row for row in rows if not row.missing]
    measured = all(row.success for row in shown)
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for at, row in enumerate(shown):
        size = row.acting / 1e6 * (1 + 0.012 * (at - len(shown) / 2))  # of marks that would lie on each other
        name = f"{row.precision}, {row.engine}"
        if measured and row.success:
            low, high = (100 * bound for bound in row.success.interval)
            rate = 100 * row.success.share
            axes.errorbar(size, rate, [[rate - low], [high - rate]], fmt="o", capsize=3, label=name)
        else:
            rate = 1 - row.cosine
            axes.plot(size, max(rate, 1e-9), "o", label=name)
    axes.set_xlabel("weights that acting needs, MB")
    axes.set_ylabel("success, % (95 % interval)" if measured else "1 - smallest cosine of the actions")
    if not measured:
        axes.set_yscale("log")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=140)
    plt.close(figure)
