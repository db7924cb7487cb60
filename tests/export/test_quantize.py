"""The int8 pass: its graphs on ONNX Runtime against the same arithmetic in numpy, its weights, and what it refuses."""

import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from ki_export.exporter import export
from ki_export.options import ExportOptions
from ki_export.passes.int8_parts import Int8Weight, read_block_name
from ki_export.passes.quantize import quantize
from ki_export.weights.int8 import in_blocks, is_large, quantize_weight
from ki_runtime.backends.backend import SessionOptions
from ki_runtime.backends.ort import cpu_options
from ki_runtime.backends.registry import choose_backend, open_session
from ki_runtime.policy.sampler import Sampler

from .test_passes import Builder, ops


class Source:
    """Weights in memory, given a few rows at a time."""

    def __init__(self, **arrays):
        self._arrays = arrays
        self.tensors = {key: SimpleNamespace(shape=array.shape) for key, array in arrays.items()}

    def pieces(self, key):
        array = self._arrays[key]
        yield from (array[start : start + 3] for start in range(0, len(array), 3))


def session(model, weights, **values):
    """The quantised graph on ONNX Runtime. `weights` f32 [out, in] of the quantised layers, `values` of the others."""
    source = Source(**weights)
    for name in weights:
        parts = Int8Weight.of(name)
        integers, values[parts.scales] = quantize_weight(source, name)
        values[parts.values] = in_blocks(integers)
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            part, at = read_block_name(name) or (name, None)
            size = value.shape[0] if value.shape else 0
            rows = slice(None) if at is None else slice(size * at, size * (at + 1))
            value.const_value = ir.tensor(values[part][rows], name=name)
    model.graph.name = "tested"
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = cpu_options(packed=True)
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def rounded_product(x, weight):
    """x W^T from 8-bit integers: one scale a row on both sides, magnitudes up to 127."""

    def integers(rows):
        scales = np.abs(rows.astype(np.float64)).max(axis=1, keepdims=True) / 127
        scales[scales == 0] = 1
        return np.rint(rows / scales), scales

    (a, a_scales), (b, b_scales) = integers(x), integers(weight)
    return (a @ b.T) * a_scales * b_scales.T


def linear_model(*, bias):
    b = Builder()
    x, w = b.input("x", "R", 24), b.weight("layer.weight", 10, 24)
    y = b.add("Gemm", x, w, *([b.weight("layer.bias", 10)] if bias else []), shape=["R", 10], transB=1)
    y.name = "layer"
    return b.model(y)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_computes_with_8_bits(bias):
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((7, 24), np.float32), rng.standard_normal((10, 24), np.float32)
    offset = rng.standard_normal(10, np.float32) if bias else np.zeros(10, np.float32)
    model = linear_model(bias=bias)
    assert quantize(model, lambda name: name == "layer.weight") == [Int8Weight.of("layer.weight")]
    assert "layer.weight" not in model.graph.initializers
    ours = session(model, {"layer.weight": weight}, **{"layer.bias": offset}).run(["layer"], {"x": x})[0]
    np.testing.assert_allclose(ours, rounded_product(x, weight) + offset, atol=2e-5)
    error = np.linalg.norm(ours - (x @ weight.T + offset)) / np.linalg.norm(ours)
    assert 1e-4 < error < 0.02  # it does round, and no more than 8 bits must


def test_a_huge_token_does_not_spoil_the_others():
    rng = np.random.default_rng(1)
    x, weight = rng.standard_normal((7, 24), np.float32), rng.standard_normal((10, 24), np.float32)
    x[3] *= 1000
    model = linear_model(bias=False)
    quantize(model, lambda name: True)
    ours = session(model, {"layer.weight": weight}).run(None, {"x": x})[0]
    wanted = x @ weight.T
    assert (np.linalg.norm(ours - wanted, axis=1) / np.linalg.norm(wanted, axis=1)).max() < 0.03


def test_rows_and_weights_of_zeros_give_zeros():
    x, weight = np.zeros((2, 24), np.float32), np.ones((10, 24), np.float32)
    x[1], weight[4] = 1, 0
    model = linear_model(bias=False)
    quantize(model, lambda name: True)
    ours = session(model, {"layer.weight": weight}).run(None, {"x": x})[0]
    assert (ours[0] == 0).all()
    assert ours[1, 4] == 0
    np.testing.assert_allclose(np.delete(ours[1], 4), 24, rtol=1e-6)


def gated_model(opening="Relu", *, swapped=False, **settings):
    """down(gate(x) * up(x)) with the views that the exporter leaves around it."""
    b = Builder()
    x = b.input("x", "B", 3, 24)
    flat = b.add("Reshape", x, b.constant([-1, 24]), shape=["3*B", 24])
    gate, up = (
        b.add(
            "Reshape",
            b.add("Gemm", flat, b.weight(f"{name}.weight", 10, 24), shape=["3*B", 10], transB=1),
            b.constant([-1, 3, 10]),
            shape=["B", 3, 10],
        )
        for name in ("gate", "up")
    )
    factors = b.add(opening, gate, shape=["B", 3, 10], **settings), up
    product = b.add("Mul", *(factors[::-1] if swapped else factors), shape=["B", 3, 10])
    hidden = b.add("Reshape", product, b.constant([-1, 10]), shape=["3*B", 10])
    return b.model(b.add("Gemm", hidden, b.weight("down.weight", 4, 10), shape=["3*B", 4], transB=1))


def test_a_gated_mlp_computes_with_8_bits_and_scales_narrow_rows_only():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2, 3, 24), np.float32) * np.float32([[[1], [30], [0.1]]])
    shapes = {"gate.weight": (10, 24), "up.weight": (10, 24), "down.weight": (4, 10)}
    weights = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    model = gated_model()
    assert [parts.weight for parts in quantize(model, lambda name: True)] == list(shapes)
    # one quantised input for gate and up, one for down
    assert ops(model).count("QuantizeLinear") == 2
    assert ops(model).count("MatMulIntegerToFloat") == 3
    # gate and down are multiplied by their rows' factors, [3*B, 1]; up is not, down's factors are by up's
    wide = [node for node in model.graph if node.op_type == "Mul" and _comes_from_product(node.inputs[0])]
    assert len(wide) == 2
    rows = x.reshape(6, 24)
    gate, up = (rounded_product(rows, weights[name]) for name in ("gate.weight", "up.weight"))
    wanted = rounded_product(np.maximum(gate, 0) * up, weights["down.weight"])
    ours = session(model, weights).run(None, {"x": x})[0]
    errors = np.linalg.norm(ours - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    assert np.median(errors) < 1e-5
    assert errors.max() < 0.02  # a value between two integers may fall either way


def _comes_from_product(value):
    producer = value.producer()
    return producer is not None and producer.op_type == "MatMulIntegerToFloat"


def test_the_engine_runs_a_product_and_its_scales_as_one_kernel(tmp_path):
    """What the speed rests on."""
    model = gated_model()
    quantize(model, lambda name: True)
    assert {node.op_type for node in model.graph if node.domain} == {"MatMulIntegerToFloat"}
    assert model.opset_imports["com.microsoft"] == 1
    weights = {"gate.weight": (10, 24), "up.weight": (10, 24), "down.weight": (4, 10)}
    session(model, {name: np.ones(shape, np.float32) for name, shape in weights.items()})
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert found.count("MatMulIntegerToFloat") == 3
    assert "Cast" not in found


def test_weights_are_rounded_to_the_nearest_of_255_values():
    weight = np.random.default_rng(3).standard_normal((11, 6), np.float32)
    weight[4], weight[7] = 0, [0.5, -1, 0.25, 0, 1, 1]
    values, scales = quantize_weight(Source(w=weight), "w")
    assert (values.shape, values.dtype, scales.shape, scales.dtype) == ((6, 11), np.int8, (11,), np.float32)
    assert np.abs(values).max() == 127
    assert (np.abs(values[:, np.arange(11) != 4]).max(axis=0) == 127).all()
    assert (np.abs(values.T * scales[:, None] - weight) <= scales[:, None] * 0.5001).all()
    assert (values[:, 4] == 0).all()
    assert values[:, 7].tolist() == [64, -127, 32, 0, 127, 127]


def test_other_weights_stay():
    model = linear_model(bias=True)
    assert quantize(model, lambda name: False) == []
    assert ops(model) == ["Gemm"]
    assert "com.microsoft" not in model.opset_imports


def refused():
    """(graph, what its message names) of each way in which a weight cannot become int8."""
    cases = {}
    for case, settings in {
        "transB": {},
        "alpha": {"transB": 1, "alpha": 2.0},
        "transA": {"transB": 1, "transA": 1},
    }.items():
        b = Builder()
        y = b.add("Gemm", b.input("x", 6, 6), b.weight("w", 6, 6), shape=[6, 6], **settings)
        cases[case] = b.model(y), "Gemm"
    b = Builder()
    cases["product"] = b.model(b.add("MatMul", b.input("x", 6, 6), b.weight("w", 6, 6), shape=[6, 6])), "MatMul"
    b = Builder()
    rows = b.add("Gather", b.weight("w", 6, 6), b.input("i", "B", dtype=ir.DataType.INT64), shape=["B", 6])
    cases["rows"] = b.model(rows), "Gather"
    b = Builder()
    w = b.weight("w", 6, 6)
    cases["both sides"] = b.model(b.add("Gemm", w, w, shape=[6, 6], transB=1)), "Gemm"
    b = Builder()
    w = b.weight("w", 6, 6)
    w.dtype = ir.DataType.FLOAT16
    cases["type"] = b.model(b.add("Gemm", b.input("x", 6, 6), w, shape=[6, 6], transB=1)), "FLOAT16"
    return cases


@pytest.mark.parametrize("case", refused())
def test_what_cannot_be_quantised_is_refused(case):
    model, named = refused()[case]
    with pytest.raises(ValueError, match=f"'w' is .*{named}"):
        quantize(model, lambda name: name == "w")


def test_the_large_products_are_chosen():
    large = (
        "vision.encoder.layers.3.self_attn.out_proj",
        "vision.encoder.layers.0.mlp.fc1",
        "projector",
        "backbone.layers.17.mlp.down_proj",
        "expert.layers.2.self_attn.q_proj",
    )
    small = (
        "vision.embeddings.patch_embedding",
        "backbone.embed_tokens",
        "backbone.layers.0.input_layernorm",
        "expert.layers.0.input_layernorm.dense",
        "action_in_proj",
        "action_out_proj",
        "time_mlp_in",
        "unembedding.0",
    )
    assert all(is_large(f"{name}.weight") for name in large)
    assert not any(is_large(f"{name}.weight") for name in small)


@pytest.fixture(scope="module")
def int8_bundle(checkpoint, tmp_path_factory):
    return export(checkpoint, tmp_path_factory.mktemp("int8") / "bundle", ExportOptions(precision="int8", verify=False))


def test_graphs_share_their_8_bit_weights(int8_bundle):
    """The backbone's weights once, for prefix and FAST decoding, and nothing of them in float32."""
    entries = int8_bundle.weights().entries
    layers = [name for name in entries if name.endswith(".int8")]
    assert {entries[name].dtype for name in layers} == {"I8"}
    assert len({name.removesuffix(".int8") for name in layers} & set(entries)) == 0
    used = {}
    for graph in ("prefix", "denoise", "fast_decode"):
        model = onnx.load(int8_bundle.graph(graph), load_external_data=False)
        used[graph] = {
            tensor.name: tuple(entry.value for entry in tensor.external_data)
            for tensor in model.graph.initializer
            if tensor.name.endswith(".int8")
        }
    shared = used["prefix"].keys() & used["fast_decode"].keys()
    assert sum(re.match(r"backbone\.layers\.0\..*", name) is not None for name in shared) == 7
    assert all(used["prefix"][name] == used["fast_decode"][name] for name in shared)


def test_actions_in_8_bits_are_near_those_in_float32(bundle, int8_bundle):
    rng = np.random.default_rng(4)
    images = rng.integers(0, 256, (1, 2, 14, 14, 3), np.uint8)
    inputs = (images, np.ones((1, 2), np.bool_), rng.integers(2, 500, (1, 9)), np.ones((1, 9), np.bool_))
    exact, rounded = (
        np.stack([Sampler.open(which, threads=1).sample_actions(*inputs, seed=seed) for seed in range(4)])
        for which in (bundle, int8_bundle)
    )
    relative = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-5 < relative < 0.05


def test_actions_in_8_bits_are_the_same_packed_or_not(int8_bundle):
    """A streamed proof maps the weights that a robot packs."""
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (1, 2, 14, 14, 3), np.uint8)
    inputs = (images, np.ones((1, 2), np.bool_), rng.integers(2, 500, (1, 9)), np.ones((1, 9), np.bool_))
    opened = partial(open_session, int8_bundle, backend=choose_backend("ort"))
    mapped, packed = (
        Sampler(int8_bundle, partial(opened, options=SessionOptions(1, prepack))).sample_actions(*inputs, seed=0)
        for prepack in (False, True)
    )
    np.testing.assert_allclose(mapped, packed, rtol=0, atol=2e-6)
