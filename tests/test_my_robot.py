"""The example that people copy: an arm of their own, driven by the shipped policy at the arm's own rate."""

import runpy
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from ki_runtime import ControlLoop, LoopOptions, Policy

EXAMPLE = Path(__file__).parents[1] / "examples" / "my_robot.py"


def test_the_arm_is_driven_at_its_rate_and_closed_once(fetch_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arm = runpy.run_path(str(EXAMPLE))["MyArm"]()
    report = ControlLoop(Policy.load(fetch_bundle), arm, LoopOptions(mode="async")).run()
    assert [episode.steps for episode in report.episodes] == [25]
    assert report.episodes[0].inferences >= 4 and report.rate["asked_hz"] == 25
    assert 0 < report.rate["achieved_hz"] <= 25 * 25 / 24 + 0.1  # the first of 25 actions waits for no tick
    assert capsys.readouterr().out == "my-arm stands still\nmy-arm is closed after 25 actions\n"


def test_as_a_program(fetch_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with patch.object(sys, "argv", [str(EXAMPLE), str(fetch_bundle)]):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "my-arm is closed after 25 actions\nepisodes      1, mode async\n" in capsys.readouterr().out
