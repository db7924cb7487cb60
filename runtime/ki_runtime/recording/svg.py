"""Curves as SVG text, for a page that needs no library and no network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 820, 66, 8, 17, 18
MOST = 2000  # points of a curve
INK, MUTED, GRID, EDGE = "#1d1d1f", "#8a8a8f", "#e3e3e6", "#b9b9c0"
BLUE, ORANGE, RED = "#2166ac", "#d98032", "#b3261e"


class Chart:
    """One panel over x in `span`; y fits what `values` hold. Marks are drawn in the order of the calls."""

    def __init__(self, label: str, span: tuple[float, float], values: Iterable[Float], height: int = 104) -> None:
        finite = [known for value in values if (known := value[np.isfinite(value)]).size]
        low = min((float(value.min()) for value in finite), default=0.0)
        high = max((float(value.max()) for value in finite), default=1.0)
        margin = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
        self._y, self._x, self._height = (low - margin, high + margin), span, height
        self._parts: list[str] = []
        for value in (low, high) if high > low else (low,):
            y = self._down(value)
            self._parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
            self._text(LEFT - 6, y + 3.5, f"{value + 0.0:.3g}", anchor="end")
        self._text(LEFT, TOP - 5, label, colour=INK)

    def curve(self, x: Float, y: Float, colour: str, width: float = 1.3, *, dashed: bool = False) -> None:
        """A line through the points; a gap where y is not finite."""
        every = _every(len(x))
        path, pen = [], "M"
        for at, value in zip(x[::every].tolist(), y[::every].tolist(), strict=True):
            if np.isfinite(value):
                path.append(f"{pen}{self._right(at):.1f} {self._down(value):.1f}")
                pen = "L"
            else:
                pen = "M"
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self._parts.append(f'<path d="{"".join(path)}" fill="none" stroke="{colour}" stroke-width="{width}"{dash}/>')

    def lines(self, places: Sequence[float], colour: str = EDGE) -> None:
        """Vertical lines, the same thing happened at each."""
        path = "".join(f"M{self._right(x):.1f} {TOP}V{self._height - BOTTOM}" for x in _few(places))
        self._parts.append(f'<path d="{path}" stroke="{colour}" fill="none"/>')

    def marks(self, places: Sequence[tuple[float, float, str]], colour: str = RED) -> None:
        """Dots (x, y) that say something when they are pointed at."""
        for x, y, words in _few(places):
            self._parts.append(
                f'<circle cx="{self._right(x):.1f}" cy="{self._down(y):.1f}" r="2.6" fill="{colour}">'
                f"<title>{escape(words)}</title></circle>"
            )

    def to_svg(self, *, axis: str = "") -> str:
        """The panel; `axis` names x, with its ends."""
        if axis:
            bottom = self._height - 4
            self._text(LEFT, bottom, f"{self._x[0]:g}")
            self._text((LEFT + WIDTH) / 2, bottom, axis, anchor="middle")
            self._text(WIDTH - RIGHT, bottom, f"{self._x[1]:g}", anchor="end")
        return (
            f'<svg viewBox="0 0 {WIDTH} {self._height}" role="img" xmlns="http://www.w3.org/2000/svg">'
            f"{''.join(self._parts)}</svg>"
        )

    def _text(self, x: float, y: float, words: str, *, anchor: str = "start", colour: str = MUTED) -> None:
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-size="10.5">'
            f"{escape(words)}</text>"
        )

    def _right(self, x: float) -> float:
        low, high = self._x
        return LEFT + (x - low) / ((high - low) or 1.0) * (WIDTH - RIGHT - LEFT)

    def _down(self, y: float) -> float:
        low, high = self._y
        return self._height - BOTTOM - (y - low) / (high - low) * (self._height - BOTTOM - TOP)


def _few(places: Sequence[Any]) -> Sequence[Any]:
    return places[:: _every(len(places))]


def _every(count: int) -> int:
    """Of so many points every how many-th is drawn."""
    return max(1, -(-count // MOST))
