"""Chunks are handed over at the right index: no action is skipped, repeated or played when its time has passed."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ki_runtime.control.schedule import Chunk, Schedule

HORIZON = 8


def chunk(number, first, horizon=HORIZON):
    """Row i holds the step that it is for, and the number of the chunk."""
    rows = np.stack([first + np.arange(horizon), np.full(horizon, number)], axis=1)
    return Chunk(number, rows.astype(np.float32), first, observed=float(first))


def take(schedule, count):
    return [schedule.take() for _ in range(count)]


def test_a_late_chunk_starts_at_the_row_that_is_due():
    schedule = Schedule(HORIZON)
    assert schedule.take() is None and schedule.step == 0
    schedule.hand_over(chunk(0, 0))
    assert [planned.index for planned in take(schedule, 3)] == [0, 1, 2]
    first = schedule.step
    take(schedule, 2)  # while the next one was computed
    assert schedule.hand_over(chunk(1, first))
    planned = schedule.take()
    assert (planned.chunk, planned.index, planned.observed) == (1, 2, 3.0)
    np.testing.assert_array_equal(planned.action, [5, 1])


def test_a_chunk_whose_rows_have_all_passed_is_refused():
    schedule = Schedule(HORIZON)
    schedule.hand_over(chunk(0, 0))
    take(schedule, 7)
    assert not schedule.hand_over(chunk(1, 0, horizon=7))
    assert schedule.take().chunk == 0 and schedule.take() is None


def test_no_time_of_a_chunk_passes_while_the_robot_holds():
    schedule = Schedule(HORIZON)
    schedule.hand_over(chunk(0, 0))
    take(schedule, 8)
    assert take(schedule, 20) == [None] * 20
    schedule.hand_over(chunk(1, 8))
    assert schedule.take().index == 0


def test_a_limit_ends_a_chunk_early():
    schedule = Schedule(3)
    schedule.hand_over(chunk(0, 0))
    assert [planned and planned.index for planned in take(schedule, 4)] == [0, 1, 2, None]
    assert len(schedule.rest()) == 5 and schedule.left == 0


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=12), st.integers(0, 5))
def test_every_step_is_played_once_and_by_the_row_that_is_meant_for_it(rounds, crossfade):
    """Whatever the delays: (ticks before a chunk is asked for, ticks that it takes)."""
    schedule, played = Schedule(HORIZON, crossfade), []

    def tick(count):
        played.extend(planned for planned in take(schedule, count) if planned is not None)

    for number, (pause, delay) in enumerate(rounds):
        tick(pause)
        first = schedule.step
        tick(delay)
        schedule.hand_over(chunk(number, first))
    tick(HORIZON)
    assert [planned.action[0] for planned in played] == list(range(len(played)))
    assert all(a.chunk <= b.chunk for a, b in pairwise(played))


def test_a_crossfade_ends_after_so_many_actions():
    schedule = Schedule(HORIZON, crossfade=3)
    schedule.hand_over(chunk(0, 0))
    take(schedule, 2)
    schedule.hand_over(chunk(4, 2))
    shares = [float(planned.action[1]) / 4 for planned in take(schedule, 5)]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1, 1])


def test_a_crossfade_is_over_where_the_old_chunk_is():
    schedule = Schedule(HORIZON, crossfade=3)
    schedule.hand_over(chunk(0, 0))
    take(schedule, 7)
    schedule.hand_over(chunk(4, 7))
    assert [float(planned.action[1]) for planned in take(schedule, 3)] == [1, 4, 4]


def test_a_new_episode_forgets():
    schedule = Schedule(HORIZON)
    schedule.hand_over(chunk(0, 0))
    take(schedule, 2)
    schedule.reset()
    assert (schedule.step, schedule.left, len(schedule.rest()), schedule.take()) == (0, 0, 0, None)
