"""An error that a robot's own code raises is told as the robot's: which method, and where."""

import subprocess
import sys

import pytest

from ki_edge.errors import BackendError, RobotError
from ki_runtime import ControlLoop, LoopOptions
from ki_runtime.control.blame import blamed

from .fake_robot import CountingRobot, FormulaPolicy


@pytest.mark.parametrize("method", ["reset", "observe", "act", "status"])
def test_the_method_and_the_place_are_told(method):
    class Failing(CountingRobot):
        pass

    def fails(self, *_, **__):
        raise ZeroDivisionError("division by zero")

    fails.__code__ = fails.__code__.replace(co_name=method)
    setattr(Failing, method, fails)
    robot = Failing()
    with pytest.raises(ZeroDivisionError) as caught:
        ControlLoop(FormulaPolicy(), robot, LoopOptions(paced=False)).run()
    found = blamed(caught.value, robot)
    assert isinstance(found, RobotError)
    assert str(found).startswith(f"counting: {method}() raised ZeroDivisionError: division by zero ({__file__}:")


def test_errors_of_others_stay_as_they_are():
    robot = CountingRobot()
    for error in (BackendError("no device"), OSError(28, "No space left on device"), ValueError("of a policy")):
        try:
            raise error
        except Exception as caught:
            assert blamed(caught, robot) is caught


def test_ki_run_says_it_in_one_line(tmp_path, fetch_bundle):
    """The class lies in the current folder, as a user's does."""
    (tmp_path / "my_arm.py").write_text(
        "import numpy as np\n"
        "from ki_runtime.robots import EpisodeStatus\n\n\n"
        "class Arm:\n"
        "    name, simulated, action_names = 'arm', True, ('x', 'y', 'z', 'gripper')\n\n"
        "    def reset(self, seed=None):\n        self.steps = 0\n\n"
        "    def observe(self):\n"
        "        picture = np.zeros((96, 96, 3), np.uint8)\n"
        "        pictures = {'front_left': picture, 'front_right': picture}\n"
        "        return {'images': pictures, 'state': np.zeros(5), 'prompt': 'go'}\n\n"
        "    def act(self, action):\n        raise RuntimeError('bus error')\n\n"
        "    def status(self):\n        return EpisodeStatus(False, None, self.steps)\n\n"
        "    def frame(self):\n        return None\n\n"
        "    def close(self):\n        pass\n"
    )
    command = [sys.executable, "-m", "ki_runtime.control.cli", str(fetch_bundle), "--robot", "my_arm:Arm", "--unpaced"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert lines[-1] == f"ki-run: error: arm: act() raised RuntimeError: bus error ({tmp_path}/my_arm.py:17)"
    assert "Traceback" not in done.stderr and "please report" not in done.stderr
    assert done.stdout == ""  # no report of a run in which nothing was sent
