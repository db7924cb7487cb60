"""Whatever fails: nothing beyond the limits, stale or sent twice reaches the robot, and no finished episode is lost."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from . import faults
from .faults import FAULTS, run, trace

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
OLDEST = 1.0  # seconds


@pytest.mark.parametrize("name", FAULTS)
def test_what_the_robot_is_told(name, tmp_path):
    fault = FAULTS[name]
    outcome = run(fault, tmp_path / "run")
    assert type(outcome.error) is (fault.ends or type(None)), outcome.error
    robot, steps = outcome.robot, outcome.steps
    assert robot.ended == ["safe_stop", "close"]
    assert all(0 <= value <= 60 for value in robot.sent)
    played = [step for step in steps if step.chunk is not None]
    assert all(later.chunk > step.chunk or later.index == step.index + 1 for step, later in pairwise(played))
    assert all(step.age <= OLDEST for step in played)
    held = [(step, later) for step, later in pairwise(steps) if later.chunk is None]
    assert all(later.action == step.action for step, later in held)
    lines = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    ends = [line for line in lines if line["event"] == "end"]
    assert len(ends) == (1 if fault.ends else 2) and ends[0]["steps"] == 40
    assert len(outcome.report.episodes) == len(ends)


def test_the_page_shows_what_happens(tmp_path):
    """`python -m tests.runtime.faults` makes it; how far the thread gets that dies is a matter of time."""

    def steady(text):
        return re.sub(r"(\| the thread that infers dies \|)[^|]*", r"\1 ", text)

    assert steady(faults.table(tmp_path)) in steady(PAGE.read_text(encoding="utf-8"))


def test_good_actions_are_played_to_the_end(tmp_path):
    assert trace(run(FAULTS["raises"], tmp_path / "a")) == "c0[0-5], c1[2-5], c2[2-7], safe_stop, close"
    slow = run(FAULTS["slow"], tmp_path / "b")
    assert trace(slow) == "c0[0-5], c1[2-5], c2[2-7], 10 held, safe_stop, close"
