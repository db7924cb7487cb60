"""The guards over combinations of small grids, against the rules in exact fractions."""

import itertools
import math

import numpy as np
import pytest

from ki_runtime.control.guards import Guards

from .guard_rules import BIG, exact, feasible, intervals, known, one, ulp

POSITIONS = [(-math.inf, math.inf), (-1.0, 1.0), (0.1, 0.1), (0.3, math.inf)]
VELOCITIES = [math.inf, 0.0, 0.7]
ACCELERATIONS = [math.inf, 0.0, 5.0]
STEPS = [math.inf, 0.0, 0.25]
STARTS = [None, 0.0, 0.95, -3.0]
MEASURED = [None, 0.1, -2.0]
TIMES = [0.1, 0.0, math.nan]
SECOND = [-9.0, -1.0, -0.33, 0.0, 0.1, 0.3, 0.95, 1.0, 1.0000001, 2.5]
FIRST = [0.0, 0.4]


@pytest.mark.parametrize("position", POSITIONS)
def test_what_is_sent_is_within_the_rules(position):
    """Two actions each: the second has a velocity behind it. Every third combination, another third for each range."""
    low, high = position
    for velocity, acceleration, step in itertools.product(VELOCITIES, ACCELERATIONS, STEPS):
        guards = Guards(one(low=low, high=high, velocity=velocity, acceleration=acceleration, step=step), trip_after=9)
        rules = [exact(value) for value in (low, high, velocity, acceleration, step)]
        cases = itertools.product(STARTS, MEASURED, TIMES, FIRST, SECOND)
        for start, measured, dt, first, second in itertools.islice(cases, POSITIONS.index(position) % 3, None, 3):
            if dt == TIMES[0] or second in SECOND[::4]:
                look(guards, rules, start, measured, dt, first, second)


def look(guards, rules, start, measured, dt, first, second):
    guards.reset(None if start is None else [start])
    state = None if measured is None else [measured]
    time = exact(dt) if dt > 0 else exact(0)
    last, speed = known(None if start is None else float(np.float32(start))), exact(0)
    if last is None and measured is not None:
        last = exact(np.float32(measured))
    for wanted in (first, second):
        verdict = guards.admit([wanted], dt=dt, measured=state)
        sent, asked = exact(verdict.action[0]), exact(np.float32(wanted))
        rows = intervals(*rules, last=last, speed=speed, measured=known(measured), dt=time)
        case = (guards.limits, start, measured, dt, wanted, last, speed, verdict)
        judge(rows, rules, asked, sent, verdict, last, case)
        if last is not None and time:
            speed = (sent - last) / time
        last = sent


def judge(rows, rules, asked, sent, verdict, last, case):
    """Within the rules by their priority, untouched where it obeys them, and the kinds are those that it breaks."""
    low, high, kept = feasible(rows)
    spare = ulp(sent, asked, last)
    within = {kind: (least, most) for kind, least, most in rows}
    for kind in ("position", "velocity"):  # exactly, whatever else
        if kind in within:
            least, most = within[kind]
            narrow = most - least < 2 * spare or rules[1] - rules[0] < spare  # no float32 may lie between
            assert least - narrow * spare - spare / 2**20 <= sent <= most + narrow * spare + spare / 2**20, case
    if rules[3] == BIG or last is None:
        assert low - spare <= sent <= high + spare, case
    elif "acceleration" in kept:  # braking ahead of the end of the range may take more than it leaves
        room_needed = rules[0] > -BIG or rules[1] < BIG
        assert room_needed or low - spare <= sent <= high + spare, case
    broken = {kind for kind, least, most in rows if not least - 4 * spare <= asked <= most + 4 * spare}
    obeyed = {kind for kind, least, most in rows if least <= asked <= most}
    if "position" in broken or (asked < rules[0] - 4 * spare or asked > rules[1] + 4 * spare):
        assert "position" in verdict.kinds, case
    for kind in ("velocity", "step", "acceleration"):
        assert kind not in broken or kind in verdict.kinds, case
        braking = kind == "acceleration"
        assert kind not in obeyed or braking or kind not in verdict.kinds, case
    if len(obeyed) == len(rows) and rules[3] == BIG and rules[0] <= asked <= rules[1]:
        assert sent == asked and not verdict.kinds, case
