"""What int8 graphs have besides 8-bit products: rewrites on ONNX Runtime against numpy and the graph before."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import ki_export.graphs.tracing
from ki_edge import graphs
from ki_edge.bundle import DecodeVocabulary
from ki_export.passes import CPU_PASSES
from ki_export.passes.quantize import quantize
from ki_export.passes.rotary import fuse_rotations
from ki_runtime.backends import ort
from ki_runtime.backends.backend import SessionOptions
from ki_runtime.backends.ort import cpu_options

from .conftest import CONFIG
from .test_passes import Builder, ops
from .test_quantize import rounded_product, session

SIZES = {"B": 2, "N": 2, "T": 3, "S": 11, "C": 13, "Q": 2}
F32 = np.float32


def run(model, spec, config, seed=0):
    """Outputs of a float32 graph on ONNX Runtime, with random weights and inputs that depend on their names alone."""

    def draw(name, shape):
        rng = np.random.default_rng([seed, *name.encode()])
        return np.asarray(rng.standard_normal(shape) * 0.3, F32)

    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            value.const_value = ir.tensor(draw(name, value.shape.numpy()), name=name)
    sizes, feeds = {**graphs.sizes(config, config.vocab_size), **SIZES}, {}
    for tensor in spec.inputs:
        shape = [int(dim) for dim in tensor.resolve(sizes)]
        if tensor.dtype == "bool":
            feeds[tensor.name] = np.arange(np.prod(shape)).reshape(shape) % 4 != 1
        elif tensor.dtype.startswith(("int", "uint")):
            feeds[tensor.name] = (np.abs(draw(tensor.name, shape)) * 9).astype(tensor.dtype)
        else:
            feeds[tensor.name] = draw(tensor.name, shape)
    packed = ir.to_proto(model).SerializeToString()
    engine = onnxruntime.InferenceSession(packed, cpu_options(packed=False), providers=["CPUExecutionProvider"])
    return engine.run(None, feeds)


@pytest.mark.parametrize("rtc", ["none", "guided", "trained"])
def test_the_rewrites_change_no_result(rtc):
    config = replace(CONFIG, rtc=rtc)
    vocabulary = DecodeVocabulary(0, config.vocab_size)
    first, second = (ki_export.graphs.tracing.trace_all(config, vocabulary, 20) for _ in range(2))
    for spec in graphs.specs(config, fast=True):
        before, after = first[spec.name], second[spec.name]
        rotations = ops(before).count("Neg") and sum(
            node.op_type == "Split" and len(node.outputs) == 2 for node in before.graph
        )
        for rewrite in CPU_PASSES:
            rewrite(after)
        assert ops(after).count("RotaryEmbedding") == rotations > 0
        for ours, wanted in zip(run(after, spec, config), run(before, spec, config), strict=True):
            np.testing.assert_allclose(ours, wanted, rtol=0, atol=3e-6)


def test_the_rows_of_the_modulation_are_split_at_once(traced):
    model = traced["denoise"]
    before = ops(model)
    for rewrite in CPU_PASSES:
        rewrite(model)
    norms = 2 * CONFIG.expert.depth + 1
    assert before.count("Split") >= norms  # one a norm
    assert [len(node.outputs) for node in model.graph if node.op_type == "Split"] == [3, norms, norms, norms]
    weights = {value for node in model.graph if node.op_type == "Split" for value in node.outputs}
    gains = [node for node in model.graph if node.op_type == "Mul" and weights & set(node.inputs)]
    assert len(gains) == norms + norms - 1  # a norm's weight; the gate of each residual branch
    divided = [node for node in gains if any(v.producer() and v.producer().op_type == "Div" for v in node.inputs)]
    assert len(divided) == norms  # without ones in between


def test_a_modulation_of_single_tokens_keeps_its_form():
    config = replace(CONFIG, rtc="trained")
    model = ki_export.graphs.tracing.trace_all(config, DecodeVocabulary(0, 0), 20)["denoise"]
    splits = [node for node in model.graph if node.op_type == "Split" and len(node.outputs) == 3]
    for rewrite in CPU_PASSES:
        rewrite(model)
    assert [node for node in model.graph if node.op_type == "Split" and len(node.outputs) == 3] == splits != []


def gated_model(*, gate_shape, used_twice=False):
    """x W^T, seen as [B, 3, 10], times a gate, added to what was before."""
    b = Builder()
    x, rest, gate = b.input("x", "3*B", 24), b.input("rest", "B", 3, 10), b.input("gate", *gate_shape)
    y = b.add("Gemm", x, b.weight("o.weight", 10, 24), shape=["3*B", 10], transB=1)
    y.name = "o"
    view = b.add("Reshape", y, b.constant([-1, 3, 10]), shape=["B", 3, 10])
    gated = b.add("Mul", view, gate, shape=["B", 3, 10])
    out = b.add("Add", rest, gated, shape=["B", 3, 10])
    return b.model(*([out, b.add("Neg", view, shape=["B", 3, 10])] if used_twice else [out]))


@pytest.mark.parametrize("used_twice", [False, True])
@pytest.mark.parametrize("shape", [(10,), (1, 3, 1)])
def test_a_gate_of_a_number_a_channel_joins_the_scales_of_the_weight(shape, used_twice):
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((10, 24), F32), rng.standard_normal((6, 24), F32) * F32([[1, 9, 1, 0.1, 1, 1]]).T
    rest, gate = rng.standard_normal((2, 3, 10), F32), rng.standard_normal(shape, F32)
    model = gated_model(gate_shape=shape, used_twice=used_twice)
    quantize(model, lambda name: True)
    joins = shape == (10,) and not used_twice
    wide = [node for node in model.graph if node.op_type == "Mul" and list(node.inputs[0].shape or ()) == ["B", 3, 10]]
    assert (wide == []) is joins
    assert any(value.name == "o" for node in model.graph for value in node.outputs) is not joins
    ours = session(model, {"o.weight": weight}).run(None, {"x": x, "rest": rest, "gate": gate})[0]
    np.testing.assert_allclose(ours, rest + rounded_product(x, weight).reshape(2, 3, 10) * gate, atol=2e-5)


def rotated_model():
    """(x W^T seen as [B, 3, 2, 8]) rotated as the tracer writes it."""
    b = Builder()
    x, angles = b.input("x", "3*B", 24), b.input("angles", "B", 3, 1, 4)
    y = b.add("Gemm", x, b.weight("q.weight", 16, 24), shape=["3*B", 16], transB=1)
    view = b.add("Reshape", y, b.constant([-1, 3, 2, 8]), shape=["B", 3, 2, 8])
    cos, sin = (b.add(op, angles, shape=["B", 3, 1, 4]) for op in ("Cos", "Sin"))
    double = b.add("Concat", cos, cos, shape=["B", 3, 1, 8], axis=-1)
    signed = b.add("Concat", b.add("Neg", sin, shape=["B", 3, 1, 4]), sin, shape=["B", 3, 1, 8], axis=-1)
    split = ir.node("Split", [view], attributes={"axis": -1, "num_outputs": 2}, num_outputs=2)
    b.nodes.append(split)
    for half in split.outputs:
        half.shape, half.type = ir.Shape(["B", 3, 2, 4]), ir.TensorType(ir.DataType.FLOAT)
    swapped = b.add("Concat", split.outputs[1], split.outputs[0], shape=["B", 3, 2, 8], axis=-1)
    straight = b.add("Mul", view, double, shape=["B", 3, 2, 8])
    crossed = b.add("Mul", swapped, signed, shape=["B", 3, 2, 8])
    return b.model(b.add("Add", straight, crossed, shape=["B", 3, 2, 8]))


def test_a_rotation_takes_the_factors_of_rows_along():
    rng = np.random.default_rng(1)
    weight, x = rng.standard_normal((16, 24), F32), rng.standard_normal((6, 24), F32) * F32([[1, 9, 1, 0.1, 1, 1]]).T
    angles = rng.standard_normal((2, 3, 1, 4), F32) * 3
    model = rotated_model()
    fuse_rotations(model)
    quantize(model, lambda name: name == "q.weight")
    assert ops(model).count("Split") == ops(model).count("Concat") == 0
    wide = [node for node in model.graph if node.op_type == "Mul" and list(node.inputs[0].shape or ())[-1:] == [16]]
    assert wide == []  # no pass over the product of its own
    y = rounded_product(x, weight).reshape(2, 3, 2, 8)
    first, second = y[..., :4], y[..., 4:]
    cos, sin = np.cos(angles), np.sin(angles)
    wanted = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    ours = session(model, {"q.weight": weight}).run(None, {"x": x, "angles": angles})[0]
    np.testing.assert_allclose(ours, wanted, atol=2e-5)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_what_a_gelu_gives_needs_no_smallest_value(approximate):
    b = Builder()
    flat = b.add("Reshape", b.input("x", "B", 3, 24), b.constant([-1, 24]), shape=["3*B", 24])
    seen = b.add("Reshape", flat, b.constant([-1, 3, 24]), shape=["B", 3, 24])
    hidden = b.add("Gelu", seen, shape=["B", 3, 24], approximate=approximate)
    rows = b.add("Reshape", hidden, b.constant([-1, 24]), shape=["3*B", 24])
    model = b.model(b.add("Gemm", rows, b.weight("fc2.weight", 10, 24), shape=["3*B", 10], transB=1))
    quantize(model, lambda name: True)
    assert "ReduceMin" not in ops(model)
    weight = np.random.default_rng(2).standard_normal((10, 24), F32)
    x = np.linspace(-6, 6, 2 * 3 * 24, dtype=F32).reshape(2, 3, 24)
    x[0, 0], x[0, 1, 0] = np.linspace(-1.5, 0, 24), 40  # rows of nothing but small values, and of one large one
    engine = session(model, {"fc2.weight": weight})
    inner = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    wanted = inner.reshape(6, 24) @ weight.T
    errors = np.abs(engine.run(None, {"x": x})[0] - wanted).max(axis=1) / np.abs(inner).max(axis=(0, 2)).min()
    assert inner.min() > -0.17005
    assert np.isfinite(errors).all()
    relative = np.linalg.norm(engine.run(None, {"x": x})[0] - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    assert relative.max() < 0.03


def test_the_engine_keeps_a_sum_and_its_norm_apart(tmp_path, monkeypatch):
    """Its kernel for both together is several times slower."""
    b = Builder()
    total = b.add("Add", b.input("x", "B", 3, 8), b.input("y", "B", 3, 8), shape=["B", 3, 8])
    normed = b.add("LayerNormalization", total, b.weight("w", 8), b.weight("b", 8), shape=["B", 3, 8])
    model = b.model(normed)
    model.graph.name = "tested"
    for value in model.graph.initializers.values():
        value.const_value = ir.tensor(np.ones(8, F32), name=value.name)
    options, optimized = cpu_options(packed=True), tmp_path / "optimized.onnx"
    options.optimized_model_filepath = str(optimized)
    monkeypatch.setattr(ort, "cpu_options", lambda *, packed: options)
    ort.load(ir.to_proto(model).SerializeToString(), SessionOptions(1), ort.WeightLayout())
    assert [node.op_type for node in onnx.load(optimized).graph.node] == ["Add", "LayerNormalization"]
