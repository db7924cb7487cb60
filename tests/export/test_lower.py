"""16-bit graphs: where the types change, and that nothing else does."""

from collections import Counter

import onnx_ir as ir
import pytest

from ki_export.passes.lower import lower
from ki_export.passes.products import EMBEDDING, matrix_products

FLOAT, HALF, BFLOAT = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
FLOAT32_OPS = ("Softmax", "LayerNormalization", "Gelu", "Cos", "Sin", "Pow", "ReduceMean", "Sqrt", "Div", "Conv")


def test_every_product_of_every_layer_has_a_name(traced):
    names = {name: [site.name for site in matrix_products(model.graph)] for name, model in traced.items()}
    layer = [f"self_attn.{part}" for part in ("k_proj", "v_proj", "q_proj", "scores", "values", "o_proj")]
    layer += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    for depth in range(2):
        assert [n for n in names["denoise"] if f".{depth}." in n] == [f"expert.layers.{depth}.{part}" for part in layer]
    dead = 1  # the prefix needs only the K/V of the last layer
    last = [n for n in names["prefix"] if n.startswith(f"backbone.layers.{dead}.")]
    assert last == [f"backbone.layers.{dead}.self_attn.{part}" for part in ("k_proj", "v_proj")]
    assert names["prefix"].count("projector") == 1 and names["fast_decode"][-1] == EMBEDDING
    vision = [n for n in names["prefix"] if n.startswith("vision")]
    assert len(vision) == 8
    assert all("action" not in name for found in names.values() for name in found)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
def test_products_are_low_and_everything_between_is_float32(traced, dtype):
    for model in traced.values():
        low = lower(model, dtype, lambda name: False)
        for node in model.graph:
            kinds = {value.dtype for value in node.inputs if value is not None and value.dtype in (FLOAT, HALF, BFLOAT)}
            assert len(kinds) <= 1, f"{node.op_type} {node.name} mixes {kinds}"  # a strongly typed engine refuses it
            if node.op_type in FLOAT32_OPS:
                assert kinds == {FLOAT}
        for site in matrix_products(model.graph):
            assert {value.dtype for value in (*site.node.inputs[:2], *site.node.outputs)} == {dtype}, site.name
            assert site.weight is None or site.weight.name in low
        assert all(value.dtype not in (HALF, BFLOAT) for value in (*model.graph.inputs, *model.graph.outputs))


def test_final_projection_embedding_of_patches_and_biases_stay_float32(traced):
    low = set()
    for model in traced.values():
        low |= lower(model, HALF, lambda name: False)
        initializers = model.graph.initializers
        for name, value in initializers.items():
            assert (value.dtype == HALF) == (name in low), name
    stay = ("action_in_proj.weight", "action_out_proj.weight", "vision.embeddings.patch_embedding.weight")
    assert not low & set(stay) and not any(name.endswith(".bias") for name in low)
    assert f"{EMBEDDING}.weight" in low


def test_what_is_kept_stays_as_it_was(traced):
    before = {name: Counter(node.op_type for node in model.graph) for name, model in traced.items()}
    for name, model in traced.items():
        assert lower(model, HALF, lambda site: True) == set()
        assert Counter(node.op_type for node in model.graph) == before[name]


def test_one_product_can_be_kept(traced):
    kept = "backbone.layers.0.self_attn.scores"
    lower(traced["prefix"], HALF, {kept}.__contains__)
    found = {site.name: site.node.inputs[0].dtype for site in matrix_products(traced["prefix"].graph)}
    assert found.pop(kept) == FLOAT and set(found.values()) == {HALF}


def test_a_table_kept_for_one_graph_is_kept_for_all(traced):
    for name in ("prefix", "fast_decode"):
        low = lower(traced[name], HALF, {EMBEDDING}.__contains__)
        assert not any(weight.startswith((EMBEDDING, "unembedding")) for weight in low)


def test_values_that_are_only_moved_between_two_products_are_not_widened(traced):
    """The result of an attention goes to o_proj, and V to the attention, without a detour through float32."""
    lower(traced["prefix"], HALF, lambda name: False)
    nodes = {site.name: site.node for site in matrix_products(traced["prefix"].graph)}
    for product, at in (("backbone.layers.0.self_attn.o_proj", 0), ("backbone.layers.0.self_attn.values", 1)):
        value = nodes[product].inputs[at]
        while value.producer().op_type in ("Reshape", "Transpose"):
            assert value.dtype == HALF
            value = value.producer().inputs[0]
        assert value.producer().op_type in ("MatMul", "Gemm"), product


def test_a_shared_operand_is_cast_once(traced):
    lower(traced["denoise"], HALF, lambda name: False)
    nodes = {site.name: site.node for site in matrix_products(traced["denoise"].graph)}
    operands = {nodes[f"expert.layers.0.self_attn.{part}_proj"].inputs[0] for part in "qkv"}
    assert len(operands) == 1
