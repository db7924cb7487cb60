"""A JAX checkpoint as a model: the actions of its PyTorch twin, through PyTorch and through an exported bundle."""

import numpy as np
import torch

from ki_edge.checkpoints import Checkpoint
from ki_edge.model import Observation, load_model
from ki_export.exporter import export
from ki_export.options import ExportOptions
from ki_runtime import Sampler


def inputs(config, horizon):
    rng = np.random.default_rng(0)
    size = config.vision.image_size
    images = rng.integers(0, 256, (1, 3, size, size, 3), dtype=np.uint8)
    given = images, np.array([[True, True, False]]), rng.integers(2, 1000, (1, 9)), np.ones((1, 9), np.bool_)
    return given, rng.standard_normal((1, horizon, config.action_dim), np.float32)


def actions(checkpoint, given, noise):
    observation = Observation(*map(torch.from_numpy, given))
    return load_model(checkpoint).sample_actions(observation, noise=torch.from_numpy(noise)).numpy()


def test_actions_are_those_of_the_pytorch_checkpoint(data):
    ours, theirs = Checkpoint.open(data / "orbax" / "openpi_a"), Checkpoint.open(data / "openpi_a")
    assert (ours.format, theirs.format) == ("openpi-jax", "openpi")
    assert ours.config == theirs.config
    given, noise = inputs(ours.config, 10)
    np.testing.assert_array_equal(actions(ours, given, noise), actions(theirs, given, noise))


def test_head_sizes_come_from_the_jax_shapes(data):
    for name in ("sharded", "bfloat16", "pi0"):
        checkpoint = Checkpoint.open(data / "orbax" / name, default_horizon=5)
        assert load_model(checkpoint) is not None
    assert Checkpoint.open(data / "orbax" / "pi0", default_horizon=5).config.variant == "pi0"


def test_an_exported_jax_checkpoint(data, tmp_path):
    bundle = export(data / "orbax" / "openpi_a", tmp_path / "bundle", ExportOptions(model_only=True))
    assert bundle.manifest.parity["verified"] and bundle.manifest.provenance["format"] == "openpi-jax"
    checkpoint = Checkpoint.open(data / "openpi_a")
    given, noise = inputs(checkpoint.config, 10)
    ours = Sampler.open(bundle).sample_actions(*given, noise=noise, num_steps=10)
    np.testing.assert_allclose(ours, actions(checkpoint, given, noise), atol=2e-5, rtol=0)
