"""Curves as SVG text, and tables, for train.html: axes with round numbers, a legend, colours for light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 820, 62, 24, 12, 26
MOST = 400  # points of a curve
COLOURS = 8  # c0 to c7 in the page's style
STYLE = """
svg.chart { width: 100%; display: block; background: var(--paper); border: 1px solid var(--line); border-radius: 8px; }
svg.chart text { fill: var(--soft); font: 10.5px system-ui, sans-serif; font-variant-numeric: tabular-nums; }
svg.chart path { fill: none; stroke-width: 1.5; stroke-linejoin: round; }
svg.chart path.grid { stroke: var(--line); stroke-width: 1; } svg.chart path.pale { stroke-width: 1; opacity: 0.28; }
svg.chart path.thick { stroke-width: 3; opacity: 0.5; } svg.chart path.dashed { stroke-dasharray: 5 3; }
.c0 { stroke: var(--c0); color: var(--c0); } .c1 { stroke: var(--c1); color: var(--c1); }
.c2 { stroke: var(--c2); color: var(--c2); } .c3 { stroke: var(--c3); color: var(--c3); }
.c4 { stroke: var(--c4); color: var(--c4); } .c5 { stroke: var(--c5); color: var(--c5); }
.c6 { stroke: var(--c6); color: var(--c6); } .c7 { stroke: var(--c7); color: var(--c7); }
svg.chart circle { fill: currentColor; stroke: none; }
.legend { margin: 0.5em 0 0.3em; font-size: 0.9em; color: var(--soft); overflow-wrap: anywhere; }
.legend span { margin-right: 1.4em; white-space: nowrap; } .legend span.long { white-space: normal; }
.legend i { display: inline-block; width: 1.5em; border-top: 3px solid currentColor; vertical-align: middle; }
.legend i { margin-right: 0.4em; }
:root { --c0: #1f6feb; --c1: #d9730d; --c2: #1a7f37; --c3: #a1348e; --c4: #0f7f8f; --c5: #b3261e; --c6: #7a6a00; }
:root { --c7: #5f5f66; }
@media (prefers-color-scheme: dark) { :root { --c0: #5a9bff; --c1: #f0a050; --c2: #4cc26a; --c3: #e08ad2; --c4: #4fc4d4;
  --c5: #ff7b72; --c6: #d8c650; --c7: #a3a3ad; } }
"""


@dataclass(frozen=True, eq=False)
class Curve:
    """Points (x, y), a gap where y is not finite. `kind`: a class of the style: pale, thick, dashed; `dots`: at points.

    Only a curve with a `label` is in the legend.
    """

    label: str
    x: Float
    y: Float
    colour: int = 0
    kind: str = ""
    dots: bool = False


def smoothed(x: Float, y: Float, colour: int, label: str, window: int = 25) -> list[Curve]:
    """A curve as logged, pale, and its running mean over the last values, at most `window`."""
    known = np.isfinite(y)
    x, y = x[known], y[known]
    window = max(1, min(window, len(y) // 8))  # of a short run fewer
    total = np.concatenate([[0.0], np.cumsum(y)])
    first = np.maximum(0, np.arange(1, len(y) + 1) - window)
    mean = (total[1:] - total[first]) / np.maximum(1, np.arange(1, len(y) + 1) - first)
    return [Curve("", x, y, colour, "pale"), Curve(label, x, mean, colour)]


def chart(
    curves: Sequence[Curve],
    *,
    axis: str = "step",
    log: bool = False,
    zero: bool = False,
    one: bool = False,
    width: int = WIDTH,
    height: int = 190,
) -> str:
    """The curves in one panel, with a legend above it where it has labels; "" where there is nothing to draw.

    `log`: the vertical axis is logarithmic, if all values are above 0. `zero`: it begins at 0 or below; `one`: it
    ends at 1 or above.
    """
    curves = [thin for curve in curves if np.isfinite((thin := _thinned(curve)).y).any()]
    if not curves:
        return ""
    values = np.concatenate([curve.y[np.isfinite(curve.y)] for curve in curves])
    places = np.concatenate([curve.x for curve in curves])
    log = log and float(values.min()) > 0
    limits = _limits(np.append(values, 1.0) if one else values, log, zero)
    panel = _Panel((float(places.min()), float(places.max())), limits, log, (width, height))
    parts = [*panel.grid(axis), *(part for curve in curves for part in panel.curve(curve))]
    svg = f'<svg class="chart" viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'
    return legend([(curve.label, curve.colour) for curve in curves if curve.label]) + svg


def legend(labels: Iterable[tuple[str, int]]) -> str:
    """What the colours mean."""
    keys = "".join(
        f'<span{" class=long" if len(label) > 40 else ""}><i class="c{colour % COLOURS}"></i>{escape(label)}</span>'
        for label, colour in labels
    )
    return f'<p class="legend">{keys}</p>' if keys else ""


class _Panel:
    """Places of values in the picture."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], log: bool, size: tuple[int, int]) -> None:
        self._x, self._y, self._log = x, y, log
        self._width, self._height = size

    def grid(self, axis: str) -> Iterable[str]:
        """Lines at round numbers of the vertical axis, both axes' numbers, the horizontal one's name."""
        for value in _decades(*self._y) if self._log else _round_numbers(*self._y, 4):
            y = self._down(value)
            yield f'<path class="grid" d="M{LEFT} {y:.1f}H{self._width - RIGHT}"/>'
            yield f'<text x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{_number(value)}</text>'
        foot = self._height - 9
        for value in _round_numbers(*self._x, self._width // 130):
            if value != round(value):  # steps and places are whole
                continue
            yield f'<text x="{self._right(value):.1f}" y="{foot}" text-anchor="middle">{_number(value)}</text>'
        yield f'<text x="8" y="{foot}">{escape(axis)}</text>'

    def curve(self, curve: Curve) -> Iterable[str]:
        """The line, and a dot where a point is alone or is to be seen."""
        points = [
            (self._right(x), self._down(y), y) if math.isfinite(y) else None
            for x, y in zip(curve.x.tolist(), curve.y.tolist(), strict=True)
        ]
        style = f"{curve.kind} c{curve.colour % COLOURS}".strip()
        pen, path = "M", []
        for point in points:
            if point is None:
                pen = "M"
                continue
            path.append(f"{pen}{point[0]:.1f} {point[1]:.1f}")
            pen = "L"
        yield f'<path class="{style}" d="{"".join(path)}"/>'
        known = [point for point in points if point is not None]
        if curve.dots or len(known) == 1:
            for x, y, value in known:
                title = f"<title>{escape(curve.label)} {value:.4g}</title>"
                yield f'<circle class="c{curve.colour % COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="2.8">{title}</circle>'

    def _right(self, x: float) -> float:
        low, high = self._x
        return LEFT + (0.5 if high == low else (x - low) / (high - low)) * (self._width - RIGHT - LEFT)

    def _down(self, y: float) -> float:
        low, high = (math.log(each) for each in self._y) if self._log else self._y
        at = math.log(y) if self._log else y
        return self._height - BOTTOM - (at - low) / (high - low) * (self._height - BOTTOM - TOP)


def _limits(values: Float, log: bool, zero: bool) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if log:
        return low / 1.15, high * 1.15
    low = min(low, 0.0) if zero else low
    margin = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
    return (low if zero and low == 0.0 else low - margin), high + margin


def _thinned(curve: Curve) -> Curve:
    """At most MOST points: means of neighbours."""
    if len(curve.x) <= MOST:
        return curve
    edges = np.linspace(0, len(curve.x), MOST + 1).astype(int)
    known = np.isfinite(curve.y)
    count = np.add.reduceat(known.astype(np.float64), edges[:-1])
    total = np.add.reduceat(np.where(known, curve.y, 0.0), edges[:-1])
    y = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return Curve(curve.label, curve.x[np.maximum(edges[1:] - 1, 0)], y, curve.colour, curve.kind, curve.dots)


def _round_numbers(low: float, high: float, about: int) -> list[float]:
    """Numbers of 1, 2 or 5 times a power of ten in the range, about so many."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten in the range, or multiples of them where these are few; of a narrow range round numbers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for times in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        found = [value for power in powers for each in times if low <= (value := each * 10.0**power) <= high]
        if len(found) >= 3:
            return found[:: -(-len(found) // 7)]
    return _round_numbers(low, high, 4)


def _number(value: float) -> str:
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.3g}"
    return f"{value:,.6g}" if abs(value) >= 1000 else f"{value:.4g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table of texts."""
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f'<div class="wide"><table><tr>{heads}</tr>{body}</table></div>'
