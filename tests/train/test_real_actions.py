"""A chunk that reaches past its episode's end: nothing is learnt from the actions that were not recorded."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ki_edge.errors import ArgumentError
from ki_edge.model import Observation, Pi05


def observation(config, batch):
    random = np.random.default_rng(0)
    shape = (batch, 2, config.vision.image_size, config.vision.image_size, 3)
    tokens = torch.from_numpy(random.integers(4, 60, (batch, 5)))
    images = torch.from_numpy(random.integers(0, 256, shape, np.uint8))
    return Observation(images, torch.ones(batch, 2, dtype=torch.bool), tokens, torch.ones(batch, 5, dtype=torch.bool))


def test_nothing_is_learnt_from_what_was_not_recorded(small_config):
    """The loss is the mean over real actions, and none of its gradient comes from the others."""
    torch.manual_seed(0)
    config = replace(small_config, action_horizon=4)
    model, random = Pi05(config), torch.Generator().manual_seed(1)
    actions = torch.randn(2, 4, config.action_dim, generator=random)
    noise, time = torch.randn(6, 4, config.action_dim, generator=random), torch.rand(6, generator=random)
    real = torch.tensor([[True, True, False, False], [True, True, True, True]])
    arguments = {"noise": noise, "time": time, "delay": torch.tensor([1, 0, 0, 0, 2, 1])}
    whole = model.compute_loss(observation(config, 2), actions, **arguments)
    found = model.compute_loss(observation(config, 2), actions, real=real, **arguments)
    kept = whole.free.numpy() & np.tile(real.numpy(), (3, 1))
    np.testing.assert_array_equal(found.free.numpy(), kept)
    flow = whole.flow.detach().numpy()
    np.testing.assert_array_equal(found.flow.detach().numpy(), np.where(kept[..., None], flow, 0.0))
    assert found.mean_flow(3).item() == pytest.approx(flow[..., :3][kept].mean(), rel=1e-6)
    none = model.compute_loss(observation(config, 2), actions, real=torch.zeros(2, 4, dtype=torch.bool), **arguments)
    assert none.mean_flow(3).item() == 0.0
    for wrong in (torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 4)):
        with pytest.raises(ArgumentError, match=r"real: .* expected torch.bool \[2, 4\]"):
            model.compute_loss(observation(config, 2), actions, real=wrong, **arguments)
