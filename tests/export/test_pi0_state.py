"""A π0 whose state tensor is wider or narrower than its actions, as LeRobot's max_state_dim allows."""

import json
from dataclasses import replace

import numpy as np
import pytest

from ki_edge import graphs
from ki_edge.checkpoints import Checkpoint
from ki_edge.config import Pi05Config
from ki_edge.errors import ArgumentError, CheckpointError
from ki_edge.model import save_checkpoint
from ki_edge.policy.contract import generic
from ki_edge.policy.normalize import NormStats, write_norm_stats
from ki_export.exporter import export
from ki_export.options import ExportOptions
from ki_export.parity.reference import ReferencePolicy
from ki_runtime import Policy

from .conftest import CONFIG, random_model

WIDE = replace(CONFIG, variant="pi0", state_width=9)  # its actions have 6
BAR = 2e-5


def make(folder, tokenizer_model, state_dim):
    save_checkpoint(random_model(config=WIDE), folder, max_token_len=48)
    (folder / "assets").mkdir()
    (folder / "assets" / "tokenizer.model").write_bytes(tokenizer_model)
    stats = NormStats(mean=[0.1] * state_dim, std=[0.5] * state_dim)
    write_norm_stats(folder / "assets" / "norm_stats.json", {"state": stats, "actions": stats})
    sizes = {"state_dim": state_dim, "action_dim": 2, "action_horizon": 5, "model_action_dim": 6, "max_token_len": 48}
    options = {"image_size": (14, 14), "prompt_format": "pi0", "normalization": "zscore", "num_steps": 4}
    generic(["left", "right"], **sizes, **options).save(folder / "contract.json")
    return folder


def test_the_width_is_that_of_the_weights(tmp_path):
    save_checkpoint(random_model(config=WIDE), tmp_path / "checkpoint", max_token_len=48)
    config = Checkpoint.open(tmp_path / "checkpoint").config
    assert config == WIDE and config.state_size == 9
    assert Pi05Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert graphs.STATE.resolve(graphs.sizes(config, 1)) == ("B", 9)
    older = {key: value for key, value in config.to_dict().items() if key != "state_width"}
    assert Pi05Config.from_dict(older).state_size == 6
    for wrong in (0, "9", True, 1.5):
        with pytest.raises(CheckpointError, match="state_width"):
            Pi05Config.from_dict({**config.to_dict(), "state_width": wrong})
    with pytest.raises(CheckpointError, match="has no state"):
        replace(CONFIG, state_width=9)


def test_the_bundle_acts_as_the_model_does(tmp_path, tokenizer_model):
    """Eight numbers of state, more than the six of an action, none of them lost."""
    folder = make(tmp_path / "checkpoint", tokenizer_model, 8)
    policy = Policy.load(export(folder, tmp_path / "bundle", ExportOptions()).path, backend="ort")
    reference = ReferencePolicy(folder)
    picture, noise = np.full((14, 14, 3), 90, np.uint8), np.random.default_rng(0).standard_normal((5, 6), np.float32)
    answers = []
    for last in (0.0, 1.0):
        observation = {"images": {"left": picture, "right": picture}, "state": [0.3] * 7 + [last], "prompt": "lift"}
        answers.append(policy.infer(observation, noise=noise)["actions"])
        expected = reference.infer(observation, noise=noise)["actions"]
        np.testing.assert_allclose(answers[-1], expected, rtol=0, atol=BAR)
    assert np.abs(answers[0] - answers[1]).max() > 1e-3


def test_a_state_that_the_model_cannot_take(tmp_path, tokenizer_model):
    folder = make(tmp_path / "checkpoint", tokenizer_model, 10)
    with pytest.raises(CheckpointError, match="a state of 10 numbers, but this π0 takes at most 9"):
        export(folder, tmp_path / "bundle", ExportOptions())
    with pytest.raises((CheckpointError, ArgumentError)):
        ReferencePolicy(folder)
