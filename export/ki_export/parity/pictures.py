"""The report's pictures as PNG bytes: error by denoise step, action traces, K/V error by layer."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from .bars import COSINE, Measurement
from .comparison import RUNTIME, Comparison
from .traces import Traces

MOST_PLOTS, COLUMNS = 15, 3
FLOOR = 1e-9  # an exact zero on a logarithmic axis


def pictures(comparison: Comparison, traces: Traces | None) -> list[tuple[str, bytes]]:
    """(caption, PNG) of every picture that the comparison has data for."""
    found = []
    steps = [m for m in comparison.measurements if m.tensor in ("x", "x_next") and m.place is not None]
    if steps:
        found.append(("Error of x after each denoise step", _lines(steps, "denoise step", comparison.bars["x"].limit)))
    if traces is not None:
        caption = f"Actions of the first case, in {traces.unit}: bundle (dashed) over reference (wide)"
        found.append((caption, _traces(traces)))
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
    axes.set(
        xlabel=label, ylabel="1 - cosine" if measurements[0].metric == COSINE else "largest difference", yscale="log"
    )
    axes.yaxis.set_minor_locator(NullLocator())
    axes.legend(fontsize=8, frameon=False)
    return _png(figure)


def _by_tensor(measurements: Iterable[Measurement]) -> list[tuple[tuple[str, str], list[Measurement]]]:
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for m in measurements:
        groups.setdefault((m.graph, m.tensor), []).append(m)
    return list(groups.items())


def _traces(traces: Traces) -> bytes:
    """A small plot for each number of an action; of very many, those that move most."""
    moved = sorted(range(len(traces.names)), key=lambda d: -float(traces.theirs[:, d].std()))
    dims = sorted(moved[:MOST_PLOTS])
    rows = -(-len(dims) // COLUMNS)
    figure = Figure(figsize=(7.2, 0.5 + 1.3 * rows), layout="constrained")
    for at, dim in enumerate(dims):
        axes = figure.add_subplot(rows, COLUMNS, at + 1)
        axes.plot(traces.theirs[:, dim], color="C0", lw=4, alpha=0.3)
        axes.plot(traces.ours[:, dim], color="C0", lw=1.2, ls="--")
        axes.set_title(traces.names[dim], fontsize=9)
        axes.tick_params(labelsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.grid(alpha=0.25)
    figure.supxlabel("action of the chunk", fontsize=8)
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
