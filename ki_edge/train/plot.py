"""The loss plot of a training run, from its JSONL log."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ki_edge.errors import CheckpointError
from ki_edge.files.writing import writing

TERMS = {"flow": "flow matching", "fast": "FAST cross-entropy", "pointing": "pointing cross-entropy"}


def read_log(path: Path) -> dict[str, list[float]]:
    """Columns of a log; after a resume the later record of a step wins."""
    records = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        records[record["step"]] = record
    rows = [records[step] for step in sorted(records)]
    return {name: [row.get(name, float("nan")) for row in rows] for name in ("step", *TERMS)}


def plot_losses(log: Path, picture: Path) -> None:
    """Draw every loss term over the steps (pale: as logged; strong: smoothed) into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = read_log(log)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, label in TERMS.items():
        logged = np.isfinite(columns[name])
        steps, values = np.array(columns["step"])[logged], np.array(columns[name])[logged]
        if len(steps):
            (line,) = axes.plot(steps, values, alpha=0.25, linewidth=0.8)
            axes.plot(steps, _smooth(values), color=line.get_color(), label=label)
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="Training losses")
    axes.grid(alpha=0.3)
    axes.legend()
    with writing(picture, CheckpointError):
        figure.savefig(picture, dpi=120)
    pyplot.close(figure)


def _smooth(values: npt.NDArray[np.float64], window: int = 25) -> list[float]:
    return [float(np.mean(values[max(0, i - window + 1) : i + 1])) for i in range(len(values))]
