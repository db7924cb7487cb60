"""`lerobot:TYPE` with the real LeRobot, which finds a robot class that a plugin registers. make test-integrations."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from .lerobot_environment import beside_lerobot

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]
PLUGIN = Path(__file__).parent / "lerobot_robot_wire"
MAPPING = {
    "robot": {"id": "one"},
    "actions": {"x": "x.pos", "y": "y.pos", "z": "z.pos", "gripper": "gripper.pos"},
    "fixed": {"base.vel": 0},
    "cameras": {"front_left": "left_cam", "front_right": "right_cam"},
    "prompt": "reach the red target",
    "control_hz": 25,
    "max_steps": 12,
}


@pytest.fixture
def drive(made_once, lerobot_python, fetch_bundle, tmp_path):
    """drive(robot={...}, kind=..., **changes of the mapping) -> (the finished ki-run, the calls that the arm got)."""
    path = beside_lerobot(lerobot_python, made_once, PLUGIN)

    def run(robot=None, kind="wire_arm", **changes):
        log = tmp_path / "calls.jsonl"
        fields = {
            **MAPPING["robot"],
            "log": str(log),
            "calibration_dir": str(tmp_path / "calibration"),
            **(robot or {}),
        }
        (tmp_path / "arm.json").write_text(json.dumps({**MAPPING, **changes, "robot": fields}))
        command = [lerobot_python, "-m", "ki_runtime.control.cli", fetch_bundle, "--robot", f"lerobot:{kind}"]
        command += ["--robot-config", tmp_path / "arm.json", "--mode", "async"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}
        result = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=600, check=False, env=environment
        )
        calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return result, calls

    return run


def last_line(result):
    return result.stderr.splitlines()[-1]


def test_a_robot_of_lerobot_is_driven(drive):
    result, calls = drive()
    assert result.returncode == 0, result.stderr
    assert calls[0] == ["connect", False] and calls[-1] == ["disconnect"]
    sent = [call[1] for call in calls if call[0] == "send"]
    assert len(sent) == 12 + 1  # and where it stood, to come to rest
    assert all(set(command) == {"x.pos", "y.pos", "z.pos", "gripper.pos", "base.vel"} for command in sent)
    assert all(command["base.vel"] == 0 for command in sent) and sent[0] != sent[11]
    assert [sent[-1][key] for key in ("x.pos", "y.pos", "z.pos")] == [
        sent[11][key] for key in ("x.pos", "y.pos", "z.pos")
    ]
    assert "calibrate" not in [call[0] for call in calls]


def test_what_was_really_sent_is_told_once(drive):
    result, _ = drive(robot={"max_relative_target": 0.001})
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("as its own limits say (max_relative_target)") == 1


def test_what_is_not_calibrated_is_not_moved(drive):
    result, calls = drive(robot={"calibrated": False})
    assert result.returncode == 2
    assert "lerobot:wire_arm is not calibrated (id 'one'): run lerobot-calibrate --robot.type=wire_arm" in last_line(
        result
    )
    assert calls == [["connect", False], ["disconnect"]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "wire_leg"}, "LeRobot has no robot 'wire_leg'; it has "),
        ({"cameras": {"front_left": "left_cam"}}, "has no camera front_right: it has front_left, and the policy needs"),
        ({"cameras": {"front_left": "cam"}}, "cameras: there is no cam; lerobot:wire_arm has the cameras left_cam"),
        ({"state": ["x.pos"]}, "has 1 numbers in its state, and the policy's contract has 5"),
        (
            {"fixed": {}},
            "nothing commands base.vel of lerobot:wire_arm: name it in actions, or give its value in fixed",
        ),
        ({"robot": {"colour": "red"}}, "lerobot:wire_arm cannot be made of its configuration: "),
    ],
)
def test_what_does_not_fit_is_told_before_anything_moves(drive, changes, words):
    result, calls = drive(**changes)
    assert result.returncode == 2 and words in last_line(result), result.stderr
    assert "Traceback" not in result.stderr
    assert "send" not in [call[0] for call in calls] and (not calls or calls[-1] == ["disconnect"])


def test_a_bus_that_fails_ends_the_run_at_rest(drive):
    result, calls = drive(robot={"fails_at": 5})
    assert result.returncode == 2 and "send_action failed: ConnectionError: no answer from the bus" in result.stderr
    assert calls[-1] == ["disconnect"] and calls[-2][0] == "send"  # to rest, as far as the bus takes it
