"""ki-serve's server with the real openpi-client as its client, unchanged, in an environment of its own."""

import contextlib
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from ki_edge.config import GemmaConfig, Pi05Config, VisionConfig
from ki_edge.model import build, save_checkpoint
from ki_edge.policy import contract as contracts
from ki_edge.policy.normalize import NormStats, write_norm_stats
from ki_export.exporter import export
from ki_export.options import ExportOptions
from ki_runtime import Policy
from ki_runtime.serving import Server, ServerOptions

from .openpi_environment import openpi_python  # noqa: F401
from .openpi_observations import HORIZON, ROBOTS, observation

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]
CHECKS = Path(__file__).parent / "openpi_serving_checks.py"
CONFIG = Pi05Config(
    vision=VisionConfig(width=16, depth=1, mlp_dim=24, num_heads=2, patch_size=7, image_size=14),
    backbone=GemmaConfig(width=24, depth=2, mlp_dim=40, num_heads=2, num_kv_heads=1, head_dim=8),
    expert=GemmaConfig(width=16, depth=2, mlp_dim=24, num_heads=2, num_kv_heads=1, head_dim=8),
    vocab_size=640,
    action_dim=16,
    action_horizon=HORIZON,
)
KEY, SEED = "a-key-of-some-length", 5


def save_checkpoint_of(robot, folder, tokenizer_model):
    """A random model with a robot's contract."""
    torch.manual_seed(1)
    model = build(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1))
    save_checkpoint(model, folder, max_token_len=200)
    (folder / "assets").mkdir(exist_ok=True)
    (folder / "assets" / "tokenizer.model").write_bytes(tokenizer_model)
    sizes = {"action_horizon": HORIZON, "model_action_dim": 16, "image_size": (14, 14), "execute": 5}
    contract = getattr(contracts, robot)(**sizes)
    stats = {
        name: NormStats(mean=[0.0] * n, std=[1.0] * n, q01=[-1.0] * n, q99=[1.0] * n)
        for name, n in (("state", contract.state_dim), ("actions", contract.action_dim))
    }
    write_norm_stats(folder / "assets" / "norm_stats.json", stats)
    contract.save(folder / "contract.json")


class Seeded:
    """A policy that draws the same noise for every plain client, so that its answers can be told beforehand."""

    def __init__(self, policy):
        self.policy, self.contract, self.sampler = policy, policy.contract, policy.sampler

    def infer(self, observation, *, seed=SEED, **arguments):
        return self.policy.infer(observation, seed=seed, **arguments)


@pytest.fixture(scope="module")
def policies(made_once, tokenizer_model):
    def make(robot):
        def export_it(place):
            place.mkdir()
            save_checkpoint_of(robot, place / "checkpoint", tokenizer_model)
            export(place / "checkpoint", place / "bundle", ExportOptions())

        return Policy.load(made_once(f"openpi_{robot}", export_it) / "bundle")

    return {robot: make(robot) for robot in ROBOTS}


def test_the_real_client_is_served_unchanged(openpi_python, policies, tmp_path):  # noqa: F811
    with contextlib.ExitStack() as running:
        started = {
            robot: running.enter_context(Server(Seeded(policy), ServerOptions(port=0)))
            for robot, policy in policies.items()
        }
        locked = running.enter_context(Server(Seeded(policies["droid"]), ServerOptions(port=0, api_key=KEY)))
        addresses = {robot: server.uri for robot, server in started.items()}
        told = {**addresses, "locked": locked.uri, "key": KEY}
        (tmp_path / "servers.json").write_text(json.dumps(told))
        checks = running.enter_context(
            subprocess.Popen(
                [openpi_python, CHECKS, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(CHECKS.parent)},
            )
        )  # fmt: skip
        running.callback(checks.kill)
        lines = []
        for line in checks.stdout:
            lines.append(line.strip())
            if lines[-1] == "restart":
                port = started["droid"].port
                started["droid"].close()
                running.enter_context(Server(Seeded(policies["droid"]), ServerOptions(port=port)))
                checks.stdin.write("done\n")
                checks.stdin.flush()
        assert checks.wait(600) == 0, (lines, checks.stderr.read())
        assert len(lines) == 7 and lines[-1] == "reconnecting"
    with np.load(tmp_path / "answers.npz") as found:
        for robot, policy in policies.items():
            for number in range(2):
                wanted = policy.infer(observation(robot, number), seed=SEED)["actions"]
                np.testing.assert_array_equal(found[f"{robot} {number}"], wanted)  # to the bit
        assert len(found.files) == 6
