"""Powers of two in a float32 graph: with divided weights it computes the same bits."""

import zlib

import numpy as np
import onnx_ir as ir
import pytest
import torch

from ki_export.arithmetic.evaluator import Evaluator
from ki_export.passes.products import matrix_products
from ki_export.passes.rescale import rescale


class Drawn:
    """Random weights by name; those in `exponents` divided by 2^k."""

    def __init__(self, exponents=None):
        self.exponents = exponents or {}

    def part(self, value, start, stop):
        return self.whole(value)[start:stop]

    def whole(self, value):
        torch.manual_seed(zlib.crc32(value.name.encode()))
        shape = value.shape.numpy()
        weight = torch.randn(*shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
        return weight / 2.0 ** self.exponents.get(value.name.removesuffix(".weight"), 0)

    def rows(self, value, rows):
        return self.whole(value)[rows.long()]


def prefix_feed():
    rng = np.random.default_rng(0)
    return {
        "images": torch.from_numpy(rng.integers(0, 256, (1, 2, 14, 14, 3)).astype(np.uint8)),
        "camera_mask": torch.ones(1, 2, dtype=torch.bool),
        "prompt_tokens": torch.from_numpy(rng.integers(0, 640, (1, 5)).astype(np.int32)),
        "prompt_mask": torch.ones(1, 5, dtype=torch.bool),
    }


@pytest.fixture
def prefix(traced):
    return traced["prefix"]


@pytest.mark.parametrize(
    ("exponents", "factors"),
    [
        # an MLP's product made smaller by its weight, undone behind down_proj
        ({"backbone.layers.0.mlp.up_proj": 7}, {"backbone.layers.0.mlp.down_proj": 7}),
        # the same without touching weights, and a weight made larger
        (
            {"backbone.layers.0.mlp.down_proj": -12},
            {"backbone.layers.0.mlp.up_proj": -7, "backbone.layers.0.mlp.down_proj": -5},
        ),
        # a product with a bias, which is not scaled
        ({"vision.encoder.layers.0.mlp.fc2": 5}, {"vision.encoder.layers.0.mlp.fc2": 5}),
    ],
)
def test_the_graph_computes_the_same_bits(prefix, exponents, factors):
    feed = prefix_feed()
    (before,) = Evaluator(prefix.graph, Drawn()).run([feed])
    rescale(prefix, factors)
    (after,) = Evaluator(prefix.graph, Drawn(exponents)).run([feed])
    assert all(torch.equal(before[name], after[name]) for name in before)
    (wrong,) = Evaluator(prefix.graph, Drawn()).run([feed])  # the factors alone do change it
    assert not torch.equal(before["prefix_k"], wrong["prefix_k"])


def test_names_of_layers_stay(prefix):
    rescale(prefix, {"backbone.layers.0.mlp.down_proj": 3})
    values = {value.name: node.op_type for node in prefix.graph for value in node.outputs}
    assert values["backbone.layers.0.mlp.down_proj"] == "Mul"
    assert "backbone.layers.0.mlp.down_proj" in [site.name for site in matrix_products(prefix.graph)]


def test_nothing_to_scale_changes_nothing(prefix):
    before = len(list(prefix.graph))
    rescale(prefix, {"expert.layers.0.mlp.down_proj": 3})
    assert len(list(prefix.graph)) == before
    assert all(isinstance(node, ir.Node) for node in prefix.graph)
