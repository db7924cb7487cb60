"""Whatever a limits file or a robot may say: limits that can be guarded, or one line."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ki_edge.errors import ArgumentError, RobotError
from ki_runtime.control.guards import Guards
from ki_runtime.control.limit_sources import KEYS, described, limits_for
from ki_runtime.control.limits import RATES
from ki_runtime.control.limits_table import limit_lines

from .test_limits import NAMES, policy, stats

NUMBERS = st.one_of(
    st.floats(), st.integers(), st.integers(-2, 6), st.sampled_from([10**400, -(10**400), 1e308, 3.5e38])
)
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=5), st.sampled_from(["last", "zero", "x"]))
NUMPY = st.one_of(NUMBERS.filter(lambda n: abs(n) < 2**60).map(np.float64), st.floats(width=32).map(np.float32))
ANY = st.recursive(
    st.one_of(
        PLAIN,
        NUMPY,
        st.lists(NUMBERS, min_size=2, max_size=2),
        st.lists(st.floats(-1, 1), min_size=2, max_size=2).map(np.array),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from([*KEYS, "q"]), inner, max_size=3)
    ),
    max_leaves=8,
)
GOOD = {
    "position": st.lists(st.one_of(st.none(), st.floats(-1, 1)), min_size=2, max_size=2).map(
        lambda p: p if None in p else sorted(p)
    ),
    **{kind: st.one_of(st.none(), st.floats(0, 10), st.integers(0, 9)) for kind in RATES},
    "measured": st.one_of(st.none(), st.integers(0, 4)),
    "gripper": st.booleans(),
    "hold": st.sampled_from(["last", "zero"]),
}
SOUND = st.fixed_dictionaries({}, optional=GOOD)
HARD = [
    10**400,
    -(10**400),
    1e308,
    3.5e38,
    math.nan,
    math.inf,
    -1,
    1.5,
    True,
    "",
    "1",
    [],
    [1],
    [2, 1],
    [0, 10**400],
    {},
]
WHOLE = st.dictionaries(st.sampled_from(NAMES), SOUND, max_size=3)
ONE_WRONG = st.builds(
    lambda said, name, key, value: {**said, name: {**said.get(name, {}), key: value}},
    WHOLE,
    st.sampled_from(NAMES),
    st.sampled_from(KEYS),
    st.one_of(st.sampled_from(HARD), ANY),
)
SAID = st.one_of(ANY, WHOLE, ONE_WRONG, ONE_WRONG, st.dictionaries(st.text(max_size=2), SOUND))


@settings(max_examples=600, deadline=None)
@given(SAID)
def test_limits_or_one_line(said):
    try:
        limits = described(said, NAMES, 5, "here", "there", RobotError)
    except RobotError as error:
        assert "\n" not in str(error) and len(str(error)) < 700
        return
    assert limits.names == NAMES and limit_lines(limits)
    try:
        guards = Guards(limits)
    except ArgumentError as error:
        assert "nothing says which number of the state measures it" in str(error)
        return
    verdict = guards.admit(np.zeros(3), dt=0.04, measured=np.zeros(5))
    assert verdict.action is not None and np.isfinite(verdict.action).all()
    assert limits_for(policy(), stats(), Named(said)).names == NAMES


class Named:
    """A robot with these limits."""

    name = "arm"

    def __init__(self, limits):
        self.limits = limits
