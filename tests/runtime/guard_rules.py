"""What the guards promise of one number, written a second time from docs/safety.md in exact fractions.

Slow and obvious: an oracle for `Guards`, which shares no code with it.
"""

from fractions import Fraction
from math import inf, isnan

import numpy as np

from ki_runtime.control.limits import Limits

LARGEST = Fraction(float(np.finfo(np.float32).max))
BIG = Fraction(10) ** 400


def exact(value):
    """A float as a fraction; infinite ones are beyond every float64."""
    if value in (inf, -inf):
        return BIG if value > 0 else -BIG
    return Fraction(float(value))


def ulp(*values):
    """Spacing of float32 at the largest of these."""
    largest = min(max([abs(value) for value in values if value is not None], default=Fraction(0)), LARGEST)
    return Fraction(float(np.spacing(np.float32(largest)))) if largest else Fraction(float(np.float32(1e-45)))


def intervals(low, high, velocity, acceleration, step, *, last, speed, measured, dt):
    """[(kind, low, high)] in the order of priority; `last` and `measured` are None where unknown; all fractions."""
    low, high = max(low, -LARGEST), min(high, LARGEST)
    out, inside = [], (low, high)
    if last is not None:
        inside = min(low, last), max(high, last)
    out.append(("position", *inside))
    if last is not None and velocity < BIG:
        out.append(("velocity", last - velocity * dt, last + velocity * dt))
    if measured is not None and step < BIG:
        out.append(("step", measured - step, measured + step))
    if last is not None and acceleration < BIG:
        reach = acceleration * dt * dt
        aim = last + speed * dt
        out.append(("acceleration", aim - reach, aim + reach))
    return out


def feasible(rows):
    """What the rows leave by their priority: each narrows what those before it leave, or where it cannot, is dropped
    for the end that is nearest to it. Returns (low, high, kinds that were kept).
    """
    _, low, high = rows[0]
    kept = [rows[0][0]]
    for kind, least, most in rows[1:]:
        if least <= high and most >= low:
            low, high = max(low, least), min(high, most)
            kept.append(kind)
        elif most < low:
            high = low
        else:
            low = high
    return low, high, kept


def one(**changes):
    """Limits of a single number called x, from plain numbers."""
    arrays = {k: np.array([v]) for k, v in changes.items() if k in ("low", "high", "velocity", "acceleration", "step")}
    rest = {k: v for k, v in changes.items() if k not in arrays}
    if "step" in arrays:
        rest.setdefault("measured", (0,))
    return Limits.none(("x",), **arrays, **rest)


def known(value):
    return None if value is None or isnan(value) else exact(value)
