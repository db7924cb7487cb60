"""The whole path on the shipped policy: export, proof, and the simulated arm reaching its targets without torch."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ki_export.parity.reference import ReferencePolicy
from ki_runtime.control.loop import ControlLoop, LoopOptions, episode_noise
from ki_runtime.policy.policy import Policy
from ki_runtime.robots import open_robot

ROBOT = "gym:FetchReach-v4"
UNSEEN = LoopOptions(episodes=10, seed=5000, paced=False)


@pytest.fixture(scope="module")
def policy(fetch_bundle: Path) -> Policy:
    return Policy.load(fetch_bundle)


@pytest.fixture(scope="module")
def reference(fetch_checkpoint: Path) -> ReferencePolicy:
    return ReferencePolicy(fetch_checkpoint)


def test_checkpoint_is_small_and_says_how_it_was_made(fetch_checkpoint: Path) -> None:
    files = [path for path in fetch_checkpoint.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    made = json.loads((fetch_checkpoint / "made.json").read_text(encoding="utf-8"))
    assert {"commands", "seed", "seconds", "machine", "versions"} <= set(made)


def test_bundle_and_checkpoint_give_the_same_actions(policy: Policy, reference: ReferencePolicy) -> None:
    arm = open_robot(ROBOT)
    shape = (policy.contract.action_horizon, policy.contract.model_action_dim)
    for seed in range(3):
        arm.reset(seed)
        for index in range(3):
            observation, noise = arm.observe(), episode_noise(seed, index, shape)
            ours, theirs = (p.infer(observation, noise=noise)["actions"] for p in (policy, reference))
            np.testing.assert_allclose(ours, theirs, atol=2e-5)
            arm.act(ours[0].astype(np.float32))
    arm.close()


def test_arm_reaches_unseen_targets(policy: Policy, reference: ReferencePolicy) -> None:
    rates = []
    for actor in (policy, reference):
        rates.append(ControlLoop(actor, open_robot(ROBOT), UNSEEN).run().success_rate)
    assert rates[0] is not None and rates[0] >= 0.9
    assert abs(rates[0] - rates[1]) <= 0.1  # float noise of 1e-6 may decide one episode that ends at 5 cm


def test_fast_tokens_decode_to_the_same_direction(policy: Policy) -> None:
    """The discrete head answers too: its first action points where the flow's does."""
    arm = open_robot(ROBOT)
    cosines = []
    for seed in range(4):
        arm.reset(seed)
        observation = arm.observe()
        fast, flow = policy.infer_fast(observation), policy.infer(observation, seed=seed)
        assert fast["problem"] is None, fast["problem"]
        a, b = fast["actions"][0, :3], flow["actions"][0, :3]
        cosines.append(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    arm.close()
    assert np.median(cosines) > 0.8, cosines


def test_ki_run_without_torch(fetch_bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ki_runtime.control.cli", str(fetch_bundle), "--robot", ROBOT, "--episodes", "2"]
    command += ["--seed", "5000", "--record", str(tmp_path / "run"), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["torch_loaded"] is False
    assert len(report["episodes"]) == 2
    assert (tmp_path / "run" / "steps.jsonl").is_file()
    assert [*(tmp_path / "run").glob("*.mp4"), *(tmp_path / "run").glob("*.gif")]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_stopped_ki_run_leaves_a_film(fetch_bundle: Path, tmp_path: Path, name: str) -> None:
    """The real command on the simulator, stopped by a signal to it alone."""
    program = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    allow = f"import signal; signal.signal(signal.{name}, signal.SIG_DFL); "  # tests may run where it is ignored
    start = "signal.signal(signal.SIGINT, signal.default_int_handler); import sys; "
    start += "from ki_runtime.control.cli import main; "
    command = [sys.executable, "-c", f"{allow}{start}sys.exit(main())", str(fetch_bundle), "--robot", ROBOT]
    command += ["--episodes", "1000", "--record", str(tmp_path / "run")]
    log, film = tmp_path / "run" / "steps.jsonl", tmp_path / "run" / "episode_000.mp4"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not log.exists() or log.read_text().count('"event": "step"') < 5:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(getattr(signal, name))
        out, err = process.communicate(timeout=300)
    assert process.returncode == 128 + getattr(signal, name) and "Traceback" not in err, err
    assert "(interrupted)" in out and f"recorded      {tmp_path / 'run'}" in out
    decoded = [program, "-v", "error", "-xerror", "-i", str(film), "-f", "framemd5", "-"]
    found = subprocess.run(decoded, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0 and not found.stderr
    assert sum(not line.startswith("#") for line in found.stdout.splitlines()) >= 6
