"""Names of matrix products, where the graph is not one of ours."""

import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from ki_export.passes.products import matrix_products


def graph_of(nodes, initializers=()):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4, 4]) for name in ("a", "b")],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [helper.make_tensor(name, TensorProto.FLOAT, [4, 4], [0.0] * 16) for name in initializers],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])).graph


def test_a_product_of_no_known_layer_is_refused():
    with pytest.raises(ValueError, match="has no q_proj before it: unknown layer"):
        matrix_products(graph_of([helper.make_node("MatMul", ["a", "b"], ["y"])]))


def test_a_softmax_that_follows_no_product_is_refused():
    nodes = [helper.make_node("Softmax", ["a"], ["p"]), helper.make_node("MatMul", ["p", "b"], ["y"])]
    with pytest.raises(ValueError, match="the softmax before it follows no product"):
        matrix_products(graph_of(nodes))


@pytest.mark.parametrize(
    ("weight", "named"),
    [
        ("backbone.layers.11.mlp.down_proj.weight", "backbone.layers.11.mlp.down_proj"),
        ("expert.layers.0.self_attn.o_proj.weight", "expert.layers.0.self_attn.o_proj"),
        ("vision.encoder.layers.2.mlp.fc1.weight", "vision.encoder.layers.2.mlp.fc1"),
        ("projector.weight", "projector"),
        ("unembedding.1", "backbone.embed_tokens"),
        ("action_out_proj.weight", None),
        ("action_in_proj.weight", None),
        ("state_proj.weight", None),
        ("action_time_mlp_in.weight", None),
    ],
)
def test_which_weights_are_worth_sixteen_bits(weight, named):
    found = matrix_products(graph_of([helper.make_node("Gemm", ["a", weight], ["y"], transB=1)], [weight]))
    assert [site.name for site in found] == ([] if named is None else [named])
