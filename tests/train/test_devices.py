"""Loss, gradients and sampler stay on the model's device: nothing of them is made on the CPU."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ki_edge.model import Pi05
from ki_edge.train.step.objective import Objective

sys.path.insert(0, str(Path(__file__).parent))
from parallel_parts import MICRO, random_batch


class Elsewhere(TorchDispatchMode):
    """Refuses every operation that makes a tensor on the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            assert not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta", function
        return result


@pytest.mark.parametrize("insulated", [True, False])
@pytest.mark.parametrize(("tokens", "delays"), [(1.0, True), (0.0, True), (1.0, False)])
def test_loss_and_gradients_make_no_tensor_on_the_cpu(insulated, tokens, delays):
    batch = random_batch(0, 4, delays=delays).to("meta")
    counts = torch.ones(3, device="meta")
    with torch.device("meta"):
        model = Pi05(MICRO, knowledge_insulation=insulated)
    with Elsewhere():
        Objective(model, (1.0, tokens, tokens))(batch, counts).total.backward()
    assert model.action_in_proj.weight.grad.device.type == "meta"


def test_the_sampler_makes_no_tensor_on_the_cpu_but_its_times():
    """Times are computed in numpy and moved; what follows stays where the pictures are."""
    batch = random_batch(0, 4).to("meta")
    with torch.device("meta"):
        model = Pi05(MICRO)
    assert model.sample_actions(batch.observation, num_steps=3).device.type == "meta"
    assert model.prefix_forward(*list(vars(batch.observation).values())[:4])[0].device.type == "meta"
