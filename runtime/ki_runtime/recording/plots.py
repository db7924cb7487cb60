"""Pictures of a run, through matplotlib, which is imported only here and only when something is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.floating[Any]]
MISSING = "plots were skipped: matplotlib is not installed (pip install matplotlib)"
INK, MUTED, GRID = "#1a1a1a", "#8a8a8a", "#e4e4e4"
BLUE, ORANGE = "#2166ac", "#d6604d"


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def plot_actions(
    path: Path,
    actions: Float,
    inferences: Sequence[int],
    recorded: Float | None = None,
    title: str = "",
    names: Sequence[str] | None = None,
) -> None:
    """One panel a dimension: executed actions [steps, a] over steps, inferences marked; `recorded` [steps, a] below.

    `names`: what the dimensions command.
    """
    dims = actions.shape[1]
    rows = -(-dims // 2) if dims > 4 else dims
    figure, panels = _panels(rows, -(-dims // rows), height=1.6, title=title)
    for dim in range(dims):
        panel = panels[dim]
        for step in inferences:
            panel.axvline(step, color=GRID, linewidth=1, zorder=0)
        if recorded is not None:
            panel.plot(recorded[:, dim], color=MUTED, linewidth=2.5, label="recorded")
        panel.plot(actions[:, dim], color=BLUE, linewidth=1.2, label="predicted" if recorded is not None else "action")
        panel.set_ylabel(f"action {dim}" if names is None else names[dim], fontsize=8)
    for panel in panels[dims:]:
        panel.set_visible(False)
    lowest = max(0, dims - len(panels) // rows)  # of each column
    for panel in panels[:lowest]:
        panel.tick_params(labelbottom=False)
    for panel in panels[lowest:dims]:
        panel.set_xlabel("step", fontsize=8)
    if recorded is not None:
        panels[0].legend(frameon=False, fontsize=8, loc="upper right")
    figure.savefig(path, dpi=130)


def plot_latency(path: Path, stages: Mapping[str, Sequence[float]]) -> None:
    """One row a stage: every measurement [ms] as a tick, p50 and p99 marked, on a logarithmic axis."""
    names = list(stages)
    figure, (panel,) = _panels(1, 1, height=0.8 + 0.42 * len(names), title="Latency by stage")
    for row, name in enumerate(names):
        values = np.maximum(np.asarray(stages[name], np.float64), 1e-3)
        panel.plot(values, np.full(values.size, row), "|", color=MUTED, alpha=0.5, markersize=9)
        for percent, colour in ((50, BLUE), (99, ORANGE)):
            label = f"p{percent}" if row == 0 else None
            panel.plot(np.percentile(values, percent), row, "o", color=colour, markersize=6, label=label)
    panel.set_xscale("log")
    panel.set_xlabel("milliseconds", fontsize=8)
    panel.set_yticks(range(len(names)), [name.removesuffix("_ms") for name in names])
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.legend(frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=130)


def _panels(rows: int, columns: int, height: float, title: str) -> tuple[Any, list[Any]]:
    """A figure and its panels, row by row. `height` in inches of one row."""
    from matplotlib.figure import Figure

    width, tall = 4.2 * columns + 1.2, height * rows + 0.6
    figure = Figure(figsize=(width, tall))
    # by hand, in inches: the layouts that find the margins draw everything twice
    edges = {"left": 0.95 / width, "right": 1 - 0.15 / width, "bottom": 0.45 / tall, "top": 1 - 0.4 / tall}
    figure.subplots_adjust(**edges, wspace=0.25, hspace=0.15)
    panels = list(np.atleast_1d(figure.subplots(rows, columns)).reshape(-1))
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8, colors=INK)
    if title:
        figure.suptitle(title, fontsize=10, x=0.01, ha="left", color=INK)
    return figure, panels
