"""Positions counted without CumSum."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper

from ki_export.arithmetic.evaluator import Evaluator
from ki_export.passes.cleanup import clean_up
from ki_export.passes.positions import count_by_sums


def graph_of(dtype=TensorProto.INT64):
    nodes = [
        helper.make_node("Cast", ["mask"], ["ones"], to=dtype),
        helper.make_node("CumSum", ["ones", "axis"], ["counts"]),
        helper.make_node("Identity", ["counts"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("mask", TensorProto.BOOL, ["B", "S"])],
        [helper.make_tensor_value_info("y", dtype, ["B", "S"])],
        [helper.make_tensor("axis", TensorProto.INT64, [], [1])],
        value_info=[helper.make_tensor_value_info("counts", dtype, ["B", "S"])],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))


@pytest.mark.parametrize("shape", [(1, 1), (1, 976), (3, 50)])
def test_counts_are_those_of_numpy(shape):
    model = graph_of()
    count_by_sums(model)
    clean_up(model)  # constants become initializers
    assert "CumSum" not in [node.op_type for node in model.graph]
    mask = np.random.default_rng(0).random(shape) < 0.7
    (found,) = Evaluator(model.graph, None).run([{"mask": torch.from_numpy(mask)}])
    np.testing.assert_array_equal(found["y"].numpy(), mask.astype(np.int64).cumsum(axis=1))


def test_another_cumsum_is_refused():
    with pytest.raises(ValueError, match="a CumSum of something else than a mask"):
        count_by_sums(graph_of(TensorProto.FLOAT))


def test_traced_graphs_have_none(traced):
    assert not [node for model in traced.values() for node in model.graph if node.op_type == "CumSum"]
