"""A recorded run as what an export calibrates on."""

from dataclasses import replace

import numpy as np
import pytest

from ki_edge.checkpoints import Checkpoint
from ki_edge.errors import DatasetError
from ki_edge.policy.prompt import PromptTokenizer
from ki_export.policies import PolicyRequest
from ki_export.precision.calibration import calibration
from ki_runtime.recording.dataset import DatasetWriter
from ki_runtime.recording.features import Features, Frame

from .complete import read_policy

pytest.importorskip("pyarrow", reason="pip install 'ki-edge[record]'")


@pytest.fixture
def policy(checkpoint):
    opened = Checkpoint.open(checkpoint)
    files = read_policy(opened.path, opened.format, opened.settings, opened.config, PolicyRequest())
    tokenizer = PromptTokenizer(checkpoint / "assets" / "tokenizer.model", files.contract.prompt_format, 64)
    return opened.config, replace(files, contract=replace(files.contract, max_token_len=64), tokenizer=tokenizer)


def write(folder, state_dim=2, episodes=3):
    """Episodes of ten frames; the pictures of frame t have the grey level 20 t."""
    features = Features(10.0, "toy", state_dim, ("x", "y"), {"left": (14, 14), "right": (14, 14)}, ("position",))
    writer = DatasetWriter(folder, features)
    for _ in range(episodes):
        writer.begin()
        for t in range(10):
            vector = np.full(2, t / 10, np.float32)
            pictures = {name: np.full((14, 14, 3), 20 * t, np.uint8) for name in features.cameras}
            state = np.full(state_dim, t / 10, np.float32)
            writer.add(Frame(t, t / 10, state, vector, vector, pictures, 0.0, 0, t, 0.1, False, (), "go"))
        writer.finish({"ki.stopped": False})


def test_observations_come_evenly_from_all_episodes(policy, tmp_path):
    config, files = policy
    write(tmp_path / "run")
    found = calibration(config, files, tmp_path / "run")
    assert found.source == "recorded: 30 observations of 3 episodes in run"
    levels = [one.images.mean() for one in found.observations]
    np.testing.assert_allclose(levels, [20 * t for t in range(10)] * 3, atol=3)
    assert all(one.images.shape == (1, 2, 14, 14, 3) for one in found.observations)


def test_a_dataset_of_another_robot_is_refused(policy, tmp_path):
    config, files = policy
    write(tmp_path / "run", state_dim=5, episodes=1)
    with pytest.raises(DatasetError, match=r"--calibrate: .*run, episode 0: 5 numbers in state, expected 2"):
        calibration(config, files, tmp_path / "run")
