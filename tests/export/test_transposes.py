"""Transposes that merge, those that only rename axes, and those that move something."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from ki_export.passes.cleanup import clean_up
from ki_export.passes.reshapes import simplify_reshapes
from ki_export.passes.transposes import simplify_transposes

from .test_passes import Builder, constant_of, ops

CASES = [  # dims of the source, perm, target of the Reshape or None where it must stay a Transpose
    (["B", "S", 1, 8], [0, 2, 1, 3], [0, 1, -1, 8]),
    (["B", 1, "S", 8], [0, 2, 1, 3], [0, -1, 1, 8]),
    (["B", 5, 1, 8], [0, 2, 1, 3], [0, 1, 5, 8]),
    (["B", 5, 2, 8], [0, 2, 1, 3], None),
    (["B", "S", 1, 8], [0, 3, 2, 1], None),
    (["B", "S", "C", 1], [3, 0, 1, 2], None),  # three free axes move: no constant target says it
]


@pytest.mark.parametrize(("dims", "order", "target"), CASES)
def test_a_transpose_that_moves_nothing_is_a_reshape(dims, order, target):
    b = Builder()
    after = [dims[axis] for axis in order]
    y = b.add("Transpose", b.input("x", *dims), shape=after, perm=order)
    model = b.model(b.add("Relu", y, shape=after))
    simplify_transposes(model)
    if target is None:
        assert ops(model) == ["Transpose", "Relu"]
    else:
        assert ops(model) == ["Reshape", "Relu"]
        reshape = next(node for node in model.graph if node.op_type == "Reshape")
        assert constant_of(reshape.inputs[1]) == target


def test_two_transposes_become_one():
    b = Builder()
    x = b.input("x", "B", 5, 2, 8)
    swapped = b.add("Transpose", x, shape=["B", 2, 5, 8], perm=[0, 2, 1, 3])
    y = b.add("Transpose", swapped, shape=["B", 2, 8, 5], perm=[0, 1, 3, 2])
    model = b.model(b.add("Relu", y, shape=["B", 2, 8, 5]), b.add("Neg", swapped, shape=["B", 2, 5, 8]))
    values = np.random.default_rng(0).standard_normal((3, 5, 2, 8), np.float32)
    before = run(model, values)
    simplify_transposes(model)
    assert all(node.inputs[0] is x for node in model.graph if node.op_type == "Transpose")
    assert [node.attributes["perm"].as_ints() for node in model.graph if node.op_type == "Transpose"][-1] == (
        0,
        2,
        3,
        1,
    )
    for ours, wanted in zip(run(model, values), before, strict=True):
        assert np.array_equal(ours, wanted)


def test_a_relative_target_keeps_its_source():
    """A Reshape to [0, 1, -1, 8] behind another Reshape: the 0 means the first one's axis, not its source's."""
    b = Builder()
    x, sizes = b.input("x", "R", 8), b.input("sizes", 4, dtype=ir.DataType.INT64)
    heads = b.add("Reshape", x, sizes, shape=["B", "S", 1, 8])
    y = b.add("Transpose", heads, shape=["B", 1, "S", 8], perm=[0, 2, 1, 3])
    model = b.model(b.add("Relu", y, shape=["B", 1, "S", 8]))
    values = np.random.default_rng(0).standard_normal((6, 8), np.float32)
    shape = np.array([2, 3, 1, 8])
    before = run(model, values, sizes=shape)
    for apply in (simplify_transposes, simplify_reshapes, clean_up):
        apply(model)
    assert np.array_equal(run(model, values, sizes=shape)[0], before[0])


def run(model, x, **others):
    model.graph.name = "tested"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    proto = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"]).run(
        None, {"x": x, **others}
    )
