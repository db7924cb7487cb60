"""What ki-run refuses before anything moves: one line, exit status 2."""

import json
from dataclasses import replace

import pytest

from ki_runtime.control import cli

from .fake_robot import CountingRobot, FormulaPolicy


class Told(CountingRobot):
    """A real arm: nobody may command it here."""

    real_time = True

    def act(self, action):
        raise AssertionError("it was moved")


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """refused(*arguments) -> what ki-run says."""
    robot = Told()
    monkeypatch.setattr("ki_runtime.policy.policy.Policy.load", lambda *_, **__: FormulaPolicy())
    monkeypatch.setattr(cli, "check_known", lambda *_: None)
    monkeypatch.setattr(cli, "open_robot", lambda spec, **_: robot)

    def run(*arguments):
        assert cli.main(["bundle", "--robot", "my-arm", *map(str, arguments)]) == 2
        assert all(event == "fit" for event, _ in robot.log)
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("ki-run: error: ")
        return line

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "0"], "rate 0.0: expected a number from 0.001"),
        (["--mode", "async", "--unpaced"], "mode async computes beside a robot that moves at a rate"),
        (["--mode", "async", "--delay", "3"], "at most 2 can be bridged"),
        (["--crossfade", "2"], "crossfade 2 blends chunks of mode async; the mode is sync"),
        (["--mode", "rtc"], "exported without real-time chunking: export it again with --rtc"),
        (["--disturb", "3"], "--disturb moves the target of a simulated arm"),
        (["--execute", "9"], "execute must be at most 5"),
        (["--limits", "nowhere.json"], "nowhere.json cannot be read: No such file or directory"),
        (["--max-seconds", "-1"], "max_seconds -1.0"),
        (["--stale-after", "0"], "stale_after 0.0"),
        (["--starve-limit", "0"], "starve_limit 0"),
    ],
)
def test_options(refused, arguments, message):
    assert message in refused(*arguments)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"q": {"position": [0, 1]}}, "no dimension of the action is called 'q'; they are action 0, action 1"),
        ({"action 0": {"position": [1, 0]}}, "limits.action 0.position: low 1 is above high 0"),
        ({"action 1": {"speed": 1}}, "unknown key 'speed'"),
    ],
)
def test_limits(refused, tmp_path, limits, message):
    (tmp_path / "limits.json").write_text(json.dumps({"limits": limits}))
    assert message in refused("--limits", tmp_path / "limits.json")


def test_rates_that_disagree(refused, monkeypatch):
    monkeypatch.setattr(Told, "control_hz", 30.0)
    monkeypatch.setattr(FormulaPolicy, "contract", replace(FormulaPolicy.contract, control_hz=20.0))
    assert "trained at 20 actions a second, and counting runs at 30: give the rate" in refused()


def test_a_stop_file_that_is_there_already(refused, tmp_path):
    (tmp_path / "stop").touch()
    assert "which stops the run, exists already: remove it first" in refused("--stop-file", tmp_path / "stop")


@pytest.mark.parametrize(
    ("robot", "message"),
    [
        ("gym:FetchReech-v4", "no such environment is known; did you mean gym:FetchReach-v4?"),
        ("my-arm", "unknown robot 'my-arm': expected gym:ID"),
        ("no_such_module:Arm", "there is no module no_such_module"),
    ],
)
def test_a_robot_that_nobody_knows_is_told_before_a_model_is_loaded(monkeypatch, capsys, robot, message):
    monkeypatch.setattr("ki_runtime.policy.policy.Policy.load", lambda *_, **__: pytest.fail("loaded"))
    assert cli.main(["bundle", "--robot", robot]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
