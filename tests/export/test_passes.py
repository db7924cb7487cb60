"""Each graph pass on a graph of a few nodes."""

import numpy as np
import onnx_ir as ir
import pytest
import torch

from ki_export.passes.cleanup import clean_up
from ki_export.passes.constants import fold_constants
from ki_export.passes.identities import remove_identities
from ki_export.passes.linear import use_stored_weights
from ki_export.passes.names import name_layers
from ki_export.passes.reshapes import simplify_reshapes


class Builder:
    """A graph under construction. Weights have no values, as after tracing."""

    def __init__(self):
        self.inputs, self.nodes, self.initializers = [], [], []

    def input(self, name, *dims, dtype=ir.DataType.FLOAT):
        self.inputs.append(ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype)))
        return self.inputs[-1]

    def weight(self, name, *dims):
        self.initializers.append(ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(ir.DataType.FLOAT)))
        return self.initializers[-1]

    def constant(self, values, dtype=np.int64):
        return self.add("Constant", value=ir.tensor(np.array(values, dtype)))

    def add(self, op_type, *inputs, shape=None, dtype=ir.DataType.FLOAT, **attributes):
        node = ir.node(op_type, inputs, attributes=attributes)
        self.nodes.append(node)
        if shape is not None:
            node.outputs[0].shape, node.outputs[0].type = ir.Shape(shape), ir.TensorType(dtype)
        return node.outputs[0]

    def model(self, *outputs):
        graph = ir.Graph(self.inputs, outputs, nodes=self.nodes, initializers=self.initializers, opset_imports={"": 20})
        for i, value in enumerate(value for node in graph for value in node.outputs):
            value.name = value.name or f"v{i}"
        return ir.Model(graph, ir_version=9)


def ops(model):
    return [node.op_type for node in model.graph if node.op_type != "Constant"]


def constant_of(value):
    return ir.convenience.get_const_tensor(value).numpy().tolist()


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_become_gemm(bias):
    b = Builder()
    x, w = b.input("x", "B", "S", 4), b.weight("layer.weight", 6, 4)
    y = b.add("MatMul", x, b.add("Transpose", w, perm=[1, 0]), shape=["B", "S", 6])
    if bias:
        y = b.add("Add", y, b.weight("layer.bias", 6), shape=["B", "S", 6])
    model = b.model(b.add("Relu", y, shape=["B", "S", 6]))
    use_stored_weights(model)
    clean_up(model)
    name_layers(model)
    assert ops(model) == ["Reshape", "Gemm", "Shape", "Concat", "Reshape", "Relu"]
    gemm = next(node for node in model.graph if node.op_type == "Gemm")
    assert [value.name for value in gemm.inputs[1:]] == ["layer.weight", "layer.bias"][: 1 + bias]
    assert gemm.attributes["transB"].as_int() == 1
    assert gemm.outputs[0].name == "layer"


def test_layers_of_one_shape_share_its_arithmetic():
    b = Builder()
    x = b.input("x", "B", "S", 4)
    for name in ("one", "two", "three"):
        x = b.add("MatMul", x, b.add("Transpose", b.weight(f"{name}.weight", 4, 4), perm=[1, 0]), shape=["B", "S", 4])
    model = b.model(b.add("Relu", x, shape=["B", "S", 4]))
    use_stored_weights(model)
    simplify_reshapes(model)
    clean_up(model)
    assert ops(model) == ["Reshape", "Gemm", "Gemm", "Gemm", "Shape", "Concat", "Reshape", "Relu"] or (
        ops(model).count("Shape") == 1 and ops(model).count("Reshape") == 2
    )


def test_an_activation_is_no_bias():
    b = Builder()
    x, w = b.input("x", "B", 4), b.weight("layer.weight", 4, 4)
    y = b.add("MatMul", x, b.add("Transpose", w, perm=[1, 0]), shape=["B", 4])
    model = b.model(b.add("Add", y, x, shape=["B", 4]))
    use_stored_weights(model)
    clean_up(model)
    assert ops(model) == ["Gemm", "Add"]


def test_two_activations_stay_a_matmul():
    b = Builder()
    x, y = b.input("x", "B", 4), b.input("y", 4, "B")
    model = b.model(b.add("MatMul", x, y, shape=["B", "B"]))
    use_stored_weights(model)
    assert ops(model) == ["MatMul"]


RESHAPES = [  # before, after, the constant target or None
    (["B", "S", 32], ["B", "S", 4, 8], [0, 0, 4, 8]),
    (["B", 4, "S", 8], ["B", 1, "4*S", 8], [0, 1, -1, 8]),
    (["R", 32], ["B", "S", 32], None),
    (["B", 10, 32], ["10*B", 32], [-1, 32]),
]


@pytest.mark.parametrize(("before", "after", "target"), RESHAPES)
def test_reshape_targets_become_constants_where_that_is_possible(before, after, target):
    b = Builder()
    x, sizes = b.input("x", *before), b.input("sizes", len(after), dtype=ir.DataType.INT64)
    y = b.add("Reshape", x, sizes, shape=after, allowzero=1)
    model = b.model(b.add("Relu", y, shape=after))
    simplify_reshapes(model)
    node = next(node for node in model.graph if node.op_type == "Reshape")
    if target is None:
        assert node.inputs[1] is sizes
    else:
        assert constant_of(node.inputs[1]) == target
        assert "allowzero" not in node.attributes


def test_chains_of_reshapes_become_one_and_empty_ones_vanish():
    b = Builder()
    x, sizes = b.input("x", "B", 6), b.input("sizes", 3, dtype=ir.DataType.INT64)
    y = b.add("Reshape", b.add("Reshape", x, sizes, shape=["B", 2, 3]), sizes, shape=["B", 3, 2])
    z = b.add("Reshape", b.add("Reshape", y, sizes, shape=["B", 1, 6]), sizes, shape=["B", 6])
    model = b.model(b.add("Relu", y, shape=["B", 3, 2]), b.add("Relu", z, shape=["B", 6]))
    simplify_reshapes(model)
    clean_up(model)
    assert ops(model).count("Reshape") == 1
    assert [node.inputs[0].name for node in model.graph if node.op_type == "Reshape"] == ["x"]


def test_whole_slices_and_casts_to_the_same_type_go():
    b = Builder()
    x = b.input("x", "B", 6)
    whole = [b.constant([0]), b.constant([2**63 - 1]), b.constant([1]), b.constant([1])]
    y = b.add("Slice", x, *whole, shape=["B", 6])
    y = b.add("Cast", y, to=ir.DataType.FLOAT.value, shape=["B", 6])
    part = b.add("Slice", y, b.constant([1]), *whole[1:], shape=["B", 5])
    model = b.model(b.add("Cast", part, to=ir.DataType.INT32.value, shape=["B", 5], dtype=ir.DataType.INT32))
    remove_identities(model)
    clean_up(model)
    assert ops(model) == ["Slice", "Cast"]


def test_constants_fold_but_weights_do_not():
    b = Builder()
    x, w = b.input("x", 4), b.weight("w", 4)
    two = b.add("Add", b.constant([1.0], np.float32), b.constant([1.0], np.float32), shape=[1])
    y = b.add("Mul", x, two, shape=[4])
    model = b.model(b.add("Mul", y, b.add("Neg", w, shape=[4]), shape=[4]))
    fold_constants(model)
    assert ops(model) == ["Mul", "Neg", "Mul"]
    assert model.graph.initializers["w"].const_value is None


def test_powers_are_folded_as_torch_computes_them():
    """numpy's float32 power differs from torch's in the last bit for a fifth of these."""
    b = Builder()
    exponents = (np.arange(0, 256, 2) / 256).astype(np.float32)
    power = b.add("Pow", b.constant(10000.0, np.float32), b.constant(exponents, np.float32), shape=[128])
    model = b.model(b.add("Mul", b.input("x", 128), power, shape=[128]))
    fold_constants(model)
    assert ops(model) == ["Mul"]
    folded = constant_of(next(node for node in model.graph if node.op_type == "Mul").inputs[1])
    assert folded == torch.pow(10000.0, torch.from_numpy(exponents)).tolist()
