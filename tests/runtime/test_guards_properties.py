"""Whatever is handed to the guards: nothing outside the limits is sent, nothing raises, a trip lasts.

`CASES` counts the actions that were judged; the figures of docs/safety.md are of one run of this file.
"""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ki_runtime.control.guards import SHORTEST, Guards
from ki_runtime.control.limits import Limits
from ki_runtime.control.verdict import REACTIONS

LARGEST = float(np.finfo(np.float32).max)
SIZES = st.integers(1, 5)
EXTREMES = [0.0, -0.0, 1e-45, 1e-38, LARGEST, -LARGEST, 3.5e38, -1e300, 1e308, math.inf, -math.inf, math.nan]
ANY = st.one_of(st.floats(-2, 2), st.sampled_from(EXTREMES), st.floats())
RATE = st.one_of(st.just(math.inf), st.floats(0, 20), st.floats(0, LARGEST), st.sampled_from([0.0, 1e-30, 1e300]))
END = st.one_of(st.floats(-3, 3), st.just(math.inf), st.floats(-LARGEST, LARGEST))
ODD_TIMES = st.sampled_from([0.0, -1.0, 1e-9, 1e9, math.inf, math.nan, None, "x"])
JUNK = st.one_of(st.none(), st.text(), st.binary(), st.lists(st.floats()), st.lists(st.lists(st.floats(), max_size=2)))
CLAMPED = [kind for kind, reaction in REACTIONS.items() if reaction == "clamp"]
ON = st.one_of(
    st.just({}),
    st.dictionaries(st.sampled_from(CLAMPED), st.sampled_from(["clamp", "hold", "hold", "stop"]), max_size=1),
)
CHECKS = st.sampled_from(
    [None, None, None, None, lambda a, _: None if a[0] < 0.5 else "no", lambda a, _: {}[a[0]] if a[0] > 0.5 else None]
)
MANY = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))


def mostly(usual, odd):
    """One in eight is odd, however many strategies that is made of."""
    return st.sampled_from(range(8)).flatmap(lambda n: odd if n == 3 else usual)


DT = mostly(st.sampled_from([0.04, 0.04, 0.02, 0.1]), st.one_of(st.floats(0.001, 0.2), ODD_TIMES))


@st.composite
def limits_of(draw, size):
    ends = [sorted((draw(END), -draw(END))) for _ in range(size)]
    rates = {kind: np.array([draw(RATE) for _ in range(size)]) for kind in ("velocity", "acceleration", "step")}
    measured = tuple(
        draw(st.integers(0, size)) if step < math.inf or draw(st.booleans()) else None for step in rates["step"]
    )
    flags = [tuple(draw(st.sampled_from([True, False, False, None])) for _ in range(size)) for _ in range(2)]
    low, high = (np.array(column) for column in zip(*ends, strict=True))
    low, high = np.where(low == math.inf, -math.inf, low), np.where(high == -math.inf, math.inf, high)
    names = tuple(f"n{at}" for at in range(size))
    return Limits.none(names, low=low, high=high, **rates, measured=measured, gripper=flags[0], motion=flags[1])


@st.composite
def episodes(draw):
    size = draw(SIZES)
    numbers = st.lists(ANY, min_size=size, max_size=size)
    actions = st.one_of(
        numbers, numbers, numbers.map(np.array), numbers.map(lambda n: np.array(n, np.longdouble)), JUNK
    )
    states = st.one_of(st.none(), st.lists(ANY, min_size=size + 1, max_size=size + 1), JUNK)
    start = draw(st.one_of(st.none(), st.lists(st.floats(-2, 2), min_size=size, max_size=size)))
    ticks = draw(
        st.lists(st.tuples(actions, DT, states, st.sampled_from([False] * 4 + [True])), min_size=6, max_size=25)
    )
    options = {"trip_after": draw(st.sampled_from([99, 3, 1])), "on": draw(ON), "check": draw(CHECKS)}
    return draw(limits_of(size)), start, ticks, options


@MANY
@given(episodes())
def test_nothing_outside_the_limits_is_sent(episode):
    judged(*episode)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_outside_random_limits_is_sent(seed):
    """300 episodes of 25 ticks each, most of whose actions are plausible: clamped, held and clean ones are all many."""
    random = np.random.default_rng(seed)
    seen = Counter()
    for _ in range(300):
        seen += judged(*random_episode(random))
    assert seen.total() == 7500 and seen["clamped"] > 2000 and min(seen["clean"], seen["held"]) > 1000, seen


def random_episode(random):
    size = int(random.integers(1, 8))

    def some(values, chance=0.5):
        return np.where(random.random(size) < chance, values, math.inf)

    centre, half = random.normal(size=size), random.gamma(1.0, 1.0, size) * (random.random(size) < 0.95)
    rates = {"velocity": some(random.gamma(2.0, 3.0, size)), "acceleration": some(random.gamma(2.0, 50.0, size))}
    limits = Limits.none(
        tuple(f"n{at}" for at in range(size)),
        low=np.maximum(centre - half, -some(np.full(size, 9.0))),
        high=centre + some(half),
        **rates,
        step=some(random.gamma(2.0, 0.5, size), 0.3),
        measured=tuple(int(at) for at in random.permutation(size)),
        gripper=tuple(random.random(size) < 0.2),
        motion=tuple(random.random(size) < 0.1),
    )
    start = None if random.random() < 0.3 else centre + random.normal(size=size) * half
    at, ticks = centre.copy(), []
    for _ in range(25):
        at = at + random.normal(size=size) * random.choice([0.0, 1e-3, 0.02, 0.3])
        action = at.astype(random.choice([np.float32, np.float64]))
        if random.random() < 0.05:
            action[random.integers(size)] = random.choice([math.nan, math.inf, 3e38, -1e-40, 0.0])
        measured = None if random.random() < 0.2 else at[np.argsort(limits.measured)] + random.normal(size=size) * 0.1
        ticks.append((action, random.choice([0.04, 0.04, 0.04, 0.02, 0.0, 3.0]), measured, random.random() < 0.1))
    on = {} if random.random() < 0.8 else {random.choice(CLAMPED): "hold"}
    return limits, start, ticks, {"trip_after": int(random.choice([3, 99, 99, 99])), "on": on, "check": None}


def judged(limits, start, ticks, options):
    """Drive the guards through an episode and assert all rules; counts what became of the actions."""
    guards = Guards(limits, longest=0.5, **options)
    guards.reset(start)
    rules, row, stopped, seen = Follower(limits, start), 0, False, Counter()
    for action, dt, measured, starved in ticks:
        if starved:
            rules.held(guards.held())
        before = guards.tripped
        verdict = guards.admit(action, dt=dt, measured=measured)
        called_for = {{**REACTIONS, **options["on"]}[kind] for kind in verdict.kinds}
        clean = not verdict.kinds or (verdict.kinds == ("gripper",) and called_for == {"clamp"})
        row = 0 if clean else row + 1
        stopped |= "stop" in called_for
        assert verdict.tripped == guards.tripped == (before or stopped or row >= options["trip_after"])
        assert verdict.stop == stopped and (bool(verdict.note) == bool(verdict.kinds) or before)
        if verdict.tripped or called_for & {"hold", "stop"}:
            seen["held"] += 1
            rules.held(verdict.action)
        else:
            seen["clamped" if verdict.kinds else "clean"] += 1
            rules.sent(verdict.action, seconds(dt), measured)
    assert guards.trips == guards.tripped
    return seen


def seconds(dt):
    try:
        return min(float(dt), 0.5) if SHORTEST <= float(dt) < math.inf else 0.0
    except (TypeError, ValueError):
        return 0.0


def float32_above(value):
    """The least float32 that is not below a number."""
    rounded = np.float32(max(value, -LARGEST))
    return rounded if rounded >= value else np.nextafter(rounded, np.float32(math.inf))


class Follower:
    """Keeps what was sent, and asserts what must hold of the next."""

    def __init__(self, limits, start):
        self.limits = limits
        self.last = None if start is None else np.array(start, np.float32)

    def held(self, action):
        """The last command to the bit, 0 for motions as near as the range allows, nothing before the first."""
        if self.last is None:
            assert action is None
            return
        motion = np.array([bool(flag) for flag in self.limits.motion])
        assert action.dtype == np.float32
        assert action[~motion].tobytes() == self.last[~motion].tobytes()
        zero = np.clip(np.zeros(len(action)), self.limits.low, self.limits.high)[motion]
        np.testing.assert_allclose(action[motion], zero.astype(np.float32), rtol=3e-7, atol=2e-45)
        self.last = action

    def sent(self, action, dt, measured):
        limits = self.limits
        assert action.dtype == np.float32 and action.shape == (len(limits.names),) and np.isfinite(action).all()
        before = self._before(measured)
        for at, value in enumerate(map(float, action)):
            low, high, last = limits.low[at], limits.high[at], before[at]
            narrow = 0.0 if float32_above(low) <= high else abs(value) * 2e-7 + 2e-45
            ends = (low, high) if math.isnan(last) else (min(low, last), max(high, last))
            assert ends[0] - narrow <= value <= ends[1] + narrow
            if not math.isnan(last):
                reach = limits.velocity[at] * dt if dt else (0.0 if limits.velocity[at] < math.inf else math.inf)
                assert abs(value - last) <= reach + 1e-15 * max(abs(value), abs(last))
        self.last = action

    def _before(self, measured):
        if self.last is not None:
            return self.last.astype(float)
        before = np.full(len(self.limits.names), math.nan)
        if measured is not None:
            for at, index in enumerate(self.limits.measured):
                if index is not None:
                    before[at] = np.float32(measured[index])
        return before


@st.composite
def steady(draw):
    """Limits with a range, a velocity and an acceleration, a start at rest within them, and wild but finite wishes."""
    size = draw(st.integers(1, 4))
    vectors = lambda low, high: st.lists(st.floats(low, high, width=32), min_size=size, max_size=size).map(np.array)  # noqa: E731
    centre, half = draw(vectors(-3, 3)), draw(vectors(0.0625, 4))
    velocity, acceleration = draw(vectors(0.125, 8)), draw(vectors(0.125, 64))
    limits = Limits.none(
        tuple(f"n{at}" for at in range(size)),
        low=centre - half,
        high=centre + half,
        velocity=velocity,
        acceleration=acceleration,
    )
    start = np.clip(centre + draw(vectors(-1, 1)) * half, centre - half, centre + half)
    wishes = draw(st.lists(vectors(-8, 8), min_size=1, max_size=12))
    return limits, start, draw(st.sampled_from([0.01, 0.02, 0.04, 0.1])), [w for w in wishes for _ in range(4)]


@MANY
@given(steady())
def test_position_velocity_and_acceleration_hold_at_once(case):
    """From rest within the range and at a steady rate, whatever is asked for: the guards brake ahead of the ends."""
    limits, start, dt, wishes = case
    guards = Guards(limits, trip_after=1 << 20)
    guards.reset(start)
    sent = [np.array(start, np.float32).astype(float)] * 2
    sent += [guards.admit(wish, dt=dt).action.astype(float) for wish in wishes]
    rows = np.array(sent)
    ulp = np.spacing(np.abs(rows).max(axis=0).astype(np.float32)).astype(float)
    assert (rows[2:] >= np.minimum(limits.low, rows[0])).all() and (rows[2:] <= np.maximum(limits.high, rows[0])).all()
    assert (np.abs(np.diff(rows, axis=0)) <= limits.velocity * dt + 1e-14).all()
    change = np.abs(np.diff(rows, n=2, axis=0))
    assert (change <= limits.acceleration * dt * dt + 4 * ulp).all()


@MANY
@given(
    st.lists(st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3), min_size=1, max_size=20), st.integers(0, 3)
)
def test_what_obeys_the_rules_is_sent_to_the_bit(actions, kinds):
    """Wide limits, or none: no action is changed, and none is counted."""
    names = ("a", "b", "c")
    wide = {"low": np.full(3, -1.0), "high": np.full(3, 1.0)} if kinds > 0 else {}
    wide |= {"velocity": np.full(3, 51.0)} if kinds > 1 else {}
    wide |= {"step": np.full(3, 2.0), "measured": (0, 1, 2)} if kinds > 2 else {}
    guards = Guards(Limits.none(names, **wide))
    for action in actions:
        verdict = guards.admit(action, dt=DT_OF_WIDE, measured=[0.0, 0.0, 0.0])
        assert verdict.action.tobytes() == np.array(action, np.float32).tobytes() and not verdict.kinds
    assert not any(guards.counts.values())


DT_OF_WIDE = 0.04
