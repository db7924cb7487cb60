"""The plugin inside the real LeRobot: its actions, and LeRobot's own command with it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from ki_edge.policy.contract import generic

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]
HERE = Path(__file__).parent
ROLLOUT = ("-m", "lerobot.scripts.lerobot_rollout", "--return_to_initial_position=false", "--play_sounds=false")
ROBOT = ("--robot.type=dummy", "--task=pick up the red cube")


def rollout(run_lerobot, log, *arguments):
    """(result, commands of 7 numbers that reached the robot)"""
    result = run_lerobot(*ROLLOUT, *ROBOT, f"--robot.log={log}", "--fps=10", *arguments)
    lines = log.read_text().splitlines() if log.exists() else []
    return result, [tuple(map(float, line.split())) for line in lines]


def test_actions_are_those_of_lerobots_own_policy(run_lerobot, lerobot_checkpoint, lerobot_bundle):
    result = run_lerobot(HERE / "compare_pi05.py", lerobot_checkpoint, lerobot_bundle)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["shape"] == [10, 7]
    assert found["largest"] > 1  # they are not all zero
    for name in ("same_noise", "same_seed", "same_joined", "golden"):
        assert found[name] < 1e-4, found
    assert found["selected"] == 0
    assert found["seam_joined"] < 0.1 * found["seam_plain"]  # which shows that joining does something


def test_the_plugins_corners(run_lerobot, lerobot_bundle):
    script = HERE / "plugin_edges.py"
    result = run_lerobot(script, lerobot_bundle)
    assert result.returncode == 0, result.stdout + result.stderr
    checks = re.findall(r"^def (check_\w+)", script.read_text(), re.M)
    assert result.stdout.split() == checks and len(checks) > 10


@pytest.mark.parametrize("engine", ["sync", "rtc"])
def test_lerobots_command_runs_to_its_end(engine, run_lerobot, lerobot_bundle, tmp_path):
    given = ("--policy.type=ki_edge", f"--policy.bundle={lerobot_bundle}", "--policy.device=cpu", "--duration=3")
    result, commands = rollout(run_lerobot, tmp_path / "log", *given, f"--inference.type={engine}")
    assert result.returncode == 0, result.stderr
    assert "Rollout finished" in result.stderr
    assert len(commands) >= 10
    assert len(set(commands)) > 5  # it moves


def test_lerobots_evaluation_runs_to_its_end(run_lerobot, lerobot_bundle, tmp_path):
    """Two environments at once: a batch of two."""
    given = ("--policy.type=ki_edge", f"--policy.bundle={lerobot_bundle}", "--policy.device=cpu", "--env.type=dummy")
    asked = ("--eval.n_episodes=2", "--eval.batch_size=2", f"--output_dir={tmp_path / 'evaluation'}")
    result = run_lerobot("-m", "lerobot.scripts.lerobot_eval", *given, *asked)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "evaluation" / "eval_info.json").read_text())["overall"]
    assert (found["n_episodes"], found["avg_sum_reward"], found["pc_success"]) == (2, 12.0, 100.0)


def test_a_saved_folder_names_the_bundle(run_lerobot, lerobot_bundle, tmp_path):
    folder = tmp_path / "policy"
    assert run_lerobot("-m", "lerobot_policy_ki_edge", lerobot_bundle, folder).returncode == 0
    again = run_lerobot("-m", "lerobot_policy_ki_edge", lerobot_bundle, folder)
    assert again.returncode == 2
    assert again.stderr.strip().endswith("exists: give the name of a new folder")
    swapped = {
        "observation.images.wrist": "observation.images.front",
        "observation.images.front": "observation.images.wrist",
    }
    named = (f"--policy.path={folder}", f"--rename_map={json.dumps(swapped)}", "--duration=1")
    result, commands = rollout(run_lerobot, tmp_path / "log", *named)
    assert result.returncode == 0, result.stderr
    assert commands


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "--policy.bundle is missing"),
        (("--policy.bundle=nowhere",), "nowhere"),
        (("--policy.bundle=ws://127.0.0.1:1",), "ws://127.0.0.1:1"),
        (("--policy.bundle={bundle}", "--policy.contract=pi05_droid"), "a bundle has its own"),
        (("--policy.bundle={bundle}", "--policy.n_action_steps=11"), "n_action_steps"),
        (("--policy.bundle={bundle}", "--policy.digest=" + 64 * "0"), "digest"),
    ],
)
def test_a_bad_bundle_is_refused_before_the_robot_is_connected(given, message, run_lerobot, lerobot_bundle, tmp_path):
    arguments = [argument.format(bundle=lerobot_bundle) for argument in given]
    result, commands = rollout(run_lerobot, tmp_path / "log", "--policy.type=ki_edge", "--duration=1", *arguments)
    assert result.returncode != 0
    assert message in result.stderr.splitlines()[-1]
    assert "Connecting robot" not in result.stderr
    assert not commands


def test_a_policy_on_another_machine(run_lerobot, tmp_path):
    """Openpi's protocol: the server tells its contract, or a file does."""
    pytest.importorskip("ki_runtime.remote.policy", reason="this version has no client of policy servers")
    PolicyServer = pytest.importorskip("tests.runtime.policy_server").PolicyServer
    contract = generic(["front", "wrist"], state_dim=8, action_dim=7, action_horizon=5, image_size=(16, 16))
    rows = np.arange(35.0, dtype=np.float32).reshape(5, 7)
    metadata = {"ki_edge": {"contract": contract.to_json()}}
    server = PolicyServer(lambda number, observation: {"actions": rows}, metadata)
    try:
        given = ("--policy.type=ki_edge", f"--policy.bundle={server.uri}", "--duration=1")
        result, commands = rollout(run_lerobot, tmp_path / "log", *given, "--policy.n_action_steps=5")
        assert result.returncode == 0, result.stderr
        assert commands[:5] == [tuple(row) for row in rows.tolist()]
        refused, _ = rollout(run_lerobot, tmp_path / "other", *given, "--policy.threads=2")
        assert "the server at" in refused.stderr.splitlines()[-1]
    finally:
        server.stop()
