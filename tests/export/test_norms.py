"""RMS norms become what ONNX Runtime runs as one kernel."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from ki_export.passes.cleanup import clean_up
from ki_export.passes.norms import divide_by_root

from .test_passes import Builder, ops

WIDTH = 16
EPSILON = 1e-6


def norm_model(kind):
    """x / rms(x) times a weight (Gemma), times 1 + weight, or times an input (adaRMS)."""
    b = Builder()
    dims = ["B", 5, WIDTH]
    x = b.input("x", *dims)
    squares = b.add("Pow", x, b.constant(2.0, np.float32), shape=dims)
    mean = b.add("ReduceMean", squares, b.constant([-1]), shape=["B", 5, 1], keepdims=1)
    root = b.add("Sqrt", b.add("Add", mean, b.constant(EPSILON, np.float32), shape=["B", 5, 1]), shape=["B", 5, 1])
    normed = b.add("Mul", x, b.add("Reciprocal", root, shape=["B", 5, 1]), shape=dims)
    if kind == "computed":
        factor = b.input("factor", 1, 1, WIDTH)
    else:
        factor = b.weight("factor", WIDTH)
        if kind == "one plus":
            factor = b.add("Add", b.constant(1.0, np.float32), factor, shape=[WIDTH])
    return b.model(b.add("Mul", normed, factor, shape=dims))


@pytest.mark.parametrize("kind", ["weight", "one plus", "computed"])
def test_a_norm_is_one_kernel_of_the_engine_and_the_same_numbers(kind, tmp_path):
    model = norm_model(kind)
    divide_by_root(model)
    clean_up(model)
    assert "Reciprocal" not in ops(model)
    rng = np.random.default_rng(0)
    x, factor = rng.standard_normal((3, 5, WIDTH), np.float32), rng.standard_normal(WIDTH, np.float32)
    feeds = {"x": x}
    if kind == "computed":
        feeds["factor"] = factor.reshape(1, 1, WIDTH)
    else:
        model.graph.initializers["factor"].const_value = ir.tensor(factor, name="factor")
    model.graph.name = "tested"
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(tmp_path / "optimized.onnx")
    proto = ir.to_proto(model).SerializeToString()
    ours = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
    wanted = x / np.sqrt((x.astype(np.float64) ** 2).mean(axis=-1, keepdims=True) + EPSILON)
    np.testing.assert_allclose(ours, wanted * (factor + (kind == "one plus")), atol=2e-6)
    found = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert found == ["SimplifiedLayerNormalization"] + ["Mul"] * (kind == "computed")


def test_other_products_with_a_reciprocal_stay():
    """x / sqrt(mean(y^2)): not a norm of x."""
    b = Builder()
    dims = ["B", WIDTH]
    x, y = b.input("x", *dims), b.input("y", *dims)
    mean = b.add("ReduceMean", b.add("Pow", y, b.constant(2.0, np.float32)), b.constant([-1]), keepdims=1)
    root = b.add("Sqrt", b.add("Add", mean, b.constant(EPSILON, np.float32)))
    model = b.model(b.add("Mul", x, b.add("Reciprocal", root), shape=dims))
    divide_by_root(model)
    assert ops(model) == ["Pow", "ReduceMean", "Add", "Sqrt", "Reciprocal", "Mul"]
