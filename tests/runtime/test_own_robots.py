"""Robots of other people: of a package that is installed, of a module that is named, and what is no robot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ki_edge.errors import RobotError
from ki_runtime import ControlLoop
from ki_runtime.robots import EpisodeStatus, open_robot
from ki_runtime.robots.protocol import check_robot

from .fake_robot import CountingRobot, FormulaPolicy

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "my_robot.py"
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "arms-of-acme"
version = "1"
[project.entry-points."ki_edge.robots"]
acme = "acme_arm:MyArm"
acme-factory = "acme_arm:MyArm"
[tool.setuptools]
py-modules = ["acme_arm"]
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The folder in which a package outside of this repository is installed: the example with an entry point."""
    source, target = tmp_path_factory.mktemp("acme"), tmp_path_factory.mktemp("site-packages")
    (source / "pyproject.toml").write_text(PROJECT)
    (source / "acme_arm.py").write_text(EXAMPLE.read_text(encoding="utf-8"))
    install = (sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "--quiet")
    command = [*install, "--disable-pip-version-check", "--target", str(target), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return target


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """modules(name, code): a module in the current folder, which is not on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    before = set(sys.modules)

    def write(name, code):
        (tmp_path / f"{name}.py").write_text(code)
        return name

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def ki_run(*arguments, folder, path=()):
    places = [*map(str, path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(place for place in places if place)}
    command = [sys.executable, "-m", "ki_runtime.control.cli", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, cwd=folder, env=environment
    )


def test_ki_run_drives_the_robot_of_an_installed_package(fetch_bundle, package, tmp_path):
    result = ki_run(fetch_bundle, "--robot", "acme", "--mode", "async", "--json", folder=tmp_path, path=[package])
    assert result.returncode == 0, result.stderr
    said, _, report = result.stdout.partition("{")
    assert said == "my-arm stands still\nmy-arm is closed after 25 actions\n"
    assert json.loads("{" + report)["episodes"][0]["steps"] == 25


def test_ki_run_drives_a_class_of_a_module_in_the_current_folder(fetch_bundle, tmp_path):
    (tmp_path / "arm_here.py").write_text(EXAMPLE.read_text(encoding="utf-8"))
    result = ki_run(fetch_bundle, "--robot", "arm_here:MyArm", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "my-arm is closed after 25 actions\n" in result.stdout


def test_an_unknown_robot_is_told_what_there_is(fetch_bundle, package, tmp_path):
    result = ki_run(fetch_bundle, "--robot", "acm", folder=tmp_path, path=[package])
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1] == (
        "ki-run: error: unknown robot 'acm': expected gym:ID, replay:FILE, lerobot:TYPE, openpi:MODULE:CLASS or "
        "MODULE:CLASS, such as my_robot:MyArm; installed packages offer acme (of arms-of-acme), acme-factory (of "
        "arms-of-acme)"
    )


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", "unknown robot '': expected gym:ID"),
        ("FetchReach-v4", "unknown robot 'FetchReach-v4': expected gym:ID, replay:FILE"),
        ("gym:", "robot 'gym:': expected gym:ID"),
        ("replay:", "robot 'replay:': expected replay:FILE"),
        ("foo:bar", "there is no module foo, neither installed .* nor in /.*; there is gym:ID, replay:FILE"),
        ("json.nothing:Arm", "there is no module json.nothing"),
        ("json:Arm", r"json/__init__.py has no Arm; it has JSONDecodeError, JSONDecoder, JSONEncoder"),
        ("os:path", "os:path is module, expected a class"),
        ("a b:c", "a b:c does not name a class"),
        ("os:__import__('os')", "does not name a class"),
        ("json:JSONDecoder:1", r"it is made as JSONDecoder\(.*and cannot be as \('1'\): too many positional"),
        (7, "a robot is named by text, such as gym:FetchReach-v4, got int"),
    ],
)
def test_what_names_no_robot(spec, words):
    with pytest.raises(RobotError, match=words) as error:
        open_robot(spec)
    assert "\n" not in str(error.value)


def test_a_module_that_fails_says_why(modules):
    with pytest.raises(RobotError, match="one needs nothing_like_it, which is not installed"):
        open_robot(modules("one", "import nothing_like_it") + ":Arm")
    with pytest.raises(RobotError, match="two cannot be imported: ZeroDivisionError: division by zero"):
        open_robot(modules("two", "1 / 0") + ":Arm")
    with pytest.raises(RobotError, match="robot 'three:Arm' cannot be opened: OSError: no such port"):
        open_robot(modules("three", "class Arm:\n  def __init__(self): raise OSError('no such\\nport')") + ":Arm")


def test_arguments_and_the_configuration_reach_the_class(modules, tmp_path):
    code = EXAMPLE.read_text(encoding="utf-8")
    code += "class Arm(MyArm):\n"
    code += "    def __init__(self, port='none', *, speed=1):\n        self.given = port, speed\n"
    modules("arms", code)
    (tmp_path / "arm.json").write_text('{"speed": 7}')
    assert open_robot("arms:Arm").given == ("none", 1)
    assert open_robot("arms:Arm:/dev/tty:0", config=tmp_path / "arm.json").given == ("/dev/tty:0", 7)
    assert open_robot("arms:Arm", config={"speed": 3}).given == ("none", 3)
    with pytest.raises(RobotError, match=r"made as Arm\(port='none', \*, speed=1\), and cannot .*'pace'"):
        open_robot("arms:Arm", config={"pace": 3})
    (tmp_path / "arm.json").write_text("[]")
    with pytest.raises(RobotError, match=r"arm\.json: expected a JSON object, found a list"):
        open_robot("arms:Arm", config=tmp_path / "arm.json")
    with pytest.raises(RobotError, match=r"none\.json cannot be read: No such file"):
        open_robot("arms:Arm", config=tmp_path / "none.json")


class Half:
    """What somebody writes first."""

    closed = False

    def observe(self):
        return {}

    def act(self):
        return None

    async def status(self):
        return EpisodeStatus(False, None, 0)

    measure = np.zeros(3)

    def close(self):
        self.closed = True


FAULTS = (
    "name is missing, expected text; it has no reset(seed), frame(); act() cannot be called as act(action); status is "
    "a coroutine or generator, expected a plain method status(); measure is array([0., 0., 0.]), expected a method "
    "measure(). docs/robots.md has the table"
)


def test_all_that_is_missing_is_said_at_once():
    with pytest.raises(RobotError) as error:
        check_robot(Half())
    assert str(error.value).startswith(f"Half is no robot yet: {FAULTS}")


def test_the_loop_checks_its_robot_before_anything_moves():
    with pytest.raises(RobotError, match="Half is no robot yet"):
        ControlLoop(FormulaPolicy(), Half())
    with pytest.raises(RobotError, match=r"the robot is the class CountingRobot: give an object of it, Counting"):
        ControlLoop(FormulaPolicy(), CountingRobot)
    check_robot(CountingRobot())


def test_what_was_opened_and_is_no_robot_is_closed(modules):
    code = "class Half:\n    closed = []\n    def close(self): self.closed.append(1)\n"
    name = modules("halves", code)
    with pytest.raises(RobotError, match="halves:Half is no robot yet: name is missing"):
        open_robot(f"{name}:Half")
    assert sys.modules[name].Half.closed == [1]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("name", None, "name is None, expected text"),
        ("control_hz", "25", "control_hz is '25', expected a number or None"),
        ("action_names", "xyz", "action_names is 'xyz', expected a tuple of texts"),
        ("real_time", 1, "real_time is 1, expected True or False"),
        ("observe", {}, r"observe is \{\}, expected a method observe\(\)"),
        ("hold", lambda seconds: None, r"hold\(seconds\) cannot be called as hold\(\)"),
        ("check", lambda action: None, r"check\(action\) cannot be called as check\(action, state\)"),
    ],
)
def test_parts_of_another_kind(name, value, words):
    robot = CountingRobot()
    setattr(robot, name, value)
    with pytest.raises(RobotError, match=words):
        check_robot(robot)


def test_two_packages_with_one_name_are_refused(monkeypatch):
    from importlib.metadata import EntryPoint

    from ki_runtime.robots import classes

    points = [EntryPoint("arm", "one:Arm", classes.GROUP), EntryPoint("arm", "two:Arm", classes.GROUP)]
    monkeypatch.setattr(classes, "entry_points", lambda group: points)
    with pytest.raises(RobotError, match=r"robot 'arm' is offered by .*\(one:Arm\) and .*\(two:Arm\): uninstall one"):
        open_robot("arm")
