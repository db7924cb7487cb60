"""Starting weights: repeatable, and of the promised sizes."""

import pytest
import torch

from ki_edge.config import TINY
from ki_edge.train.initialization import from_scratch


def test_a_seed_gives_the_same_weights(small_config):
    torch.manual_seed(1)
    first = from_scratch(small_config, seed=3).state_dict()
    torch.manual_seed(2)
    again, other = from_scratch(small_config, seed=3).state_dict(), from_scratch(small_config, seed=4).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["action_in_proj.weight"], other["action_in_proj.weight"])


@torch.no_grad()
def test_sizes():
    """Variances as the docstring says, on a model wide enough to measure them."""
    model = from_scratch(TINY, seed=0)
    layer, depth = model.backbone.stack[0], TINY.backbone.depth
    for weight, variance in (
        (layer.self_attn.q_proj.weight, 1 / 128),
        (layer.mlp.up_proj.weight, 1 / 128),
        (layer.mlp.down_proj.weight, 1 / 384 / (2 * depth)),
        (layer.self_attn.o_proj.weight, 1 / 128 / (2 * depth)),
        (model.vision.embeddings.patch_embedding.weight, 1 / (3 * 16 * 16)),
        (model.action_out_proj.weight, 1 / 96),
        (model.expert.norm.dense.weight, 0.01 / 96),
    ):
        assert weight.var().item() == pytest.approx(variance, rel=0.15)
        assert abs(weight.mean().item()) < 0.1 * variance**0.5
    assert model.backbone.embed(torch.arange(1024)).var().item() == pytest.approx(1.0, rel=0.1)
    for norm in (model.expert.norm, model.expert.stack[1].input_layernorm):
        scale, shift, gate = norm.dense.bias.chunk(3)
        assert not scale.any()
        assert not shift.any()
        assert (gate == 1).all()


def test_insulation_is_passed_on(small_config):
    assert from_scratch(small_config, seed=0).knowledge_insulation
    assert not from_scratch(small_config, seed=0, knowledge_insulation=False).knowledge_insulation
