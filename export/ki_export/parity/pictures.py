"""The report's pictures as PNG bytes: error by denoise step, action traces, K/V error by layer."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from .bars import Measurement
from .comparison import RUNTIME, Array, Comparison

SHOWN_ACTIONS = 6
FLOOR = 1e-9  # an exact zero on a logarithmic axis


def pictures(comparison: Comparison) -> list[tuple[str, bytes]]:
    """(caption, PNG) of every picture that the comparison has data for."""
    found = []
    steps = [m for m in comparison.measurements if m.tensor in ("x", "x_next") and m.place is not None]
    if steps:
        found.append(("Error of x after each denoise step", _lines(steps, "denoise step", comparison.bars["x"].limit)))
    if comparison.traces is not None:
        found.append(("Actions: bundle over reference, first case", _traces(*comparison.traces)))
    layers = [m for m in comparison.measurements if m.tensor in ("prefix_k", "prefix_v") and m.graph == RUNTIME]
    if layers:
        found.append(("Error of the prefix K/V by layer", _lines(layers, "layer", None)))
    return found


def _lines(measurements: Sequence[Measurement], label: str, bar: float | None) -> bytes:
    figure, axes = _axes()
    for (graph, tensor), points in _by_tensor(measurements):
        places = sorted({m.place for m in points if m.place is not None})
        worst = [max(m.error for m in points if m.place == place) for place in places]
        (line,) = axes.plot(
            places, [max(error, FLOOR) for error in worst], marker="o", ms=3, label=f"{graph}: {tensor}"
        )
        if bar is None:
            limits = [min(m.limit for m in points if m.place == place) for place in places]
            axes.plot(places, limits, color=line.get_color(), lw=1, ls="--", label=f"bar of {tensor}")
    if bar is not None:
        axes.axhline(bar, color="#b3261e", lw=1, ls="--", label=f"bar {bar:.0e}")
    axes.set(xlabel=label, ylabel=measurements[0].metric, yscale="log")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.legend(fontsize=8, frameon=False)
    return _png(figure)


def _by_tensor(measurements: Iterable[Measurement]) -> list[tuple[tuple[str, str], list[Measurement]]]:
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for m in measurements:
        groups.setdefault((m.graph, m.tensor), []).append(m)
    return list(groups.items())


def _traces(ours: Array, theirs: Array) -> bytes:
    """Actions [H,A]: the dimensions that move most."""
    dims = sorted(range(theirs.shape[1]), key=lambda d: -float(theirs[:, d].std()))[:SHOWN_ACTIONS]
    figure, axes = _axes()
    for colour, dim in enumerate(sorted(dims)):
        axes.plot(theirs[:, dim], color=f"C{colour}", lw=4, alpha=0.3)
        axes.plot(ours[:, dim], color=f"C{colour}", lw=1.2, ls="--", label=f"dim {dim}")
    axes.set(xlabel="action of the chunk (wide: reference, dashed: bundle)", ylabel="normalised action")
    axes.legend(fontsize=8, frameon=False, ncols=3)
    return _png(figure)


def _axes() -> tuple[Figure, Axes]:
    """A figure with margins by hand: the layouts that find them draw everything twice."""
    figure = Figure(figsize=(7.2, 3.4))
    figure.subplots_adjust(left=0.11, right=0.98, bottom=0.14, top=0.97)
    axes = figure.add_subplot()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    return figure, axes


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
