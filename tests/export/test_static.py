"""The graphs of eight and four bits: what stands around each product, and the numbers of their weights."""

from collections import Counter

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch

from ki_edge.bundle import DecodeVocabulary
from ki_edge.checkpoints import Checkpoint
from ki_edge.checkpoints.layout.keys import checkpoint_key
from ki_edge.errors import ExportError
from ki_export.graphs.tracing import trace_all
from ki_export.passes.low_plan import LowPlan, LowProduct
from ki_export.passes.lower import lower
from ki_export.passes.products import EMBEDDING, matrix_products
from ki_export.passes.static import quantize_static
from ki_export.precision.low_models import quantize_models
from ki_export.weights.low_bits import SCALES, SECOND, VALUES, LowForm, LowWeights

UP = "backbone.layers.0.mlp.up_proj"
LOW = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN, "nvfp4": ir.DataType.FLOAT4E2M1}
BITS = {"int8": 8, "fp8": 8, "nvfp4": 4.5}
KINDS = tuple(LOW)


@pytest.fixture
def lowered(data):
    """Graphs of openpi's recorded small model in float16, by name."""
    models = trace_all(Checkpoint.open(data / "openpi_a").config, DecodeVocabulary(0, 64), 20)
    for model in models.values():
        lower(model, ir.DataType.FLOAT16, lambda site: False)
    return models


@pytest.fixture(scope="module")
def source(data):
    return Checkpoint.open(data / "openpi_a").source


def plan_of(kind, models, attention="fp8", **more):
    products = {}
    for model in models.values():
        for site in matrix_products(model.graph):
            if site.weight is not None and site.name != EMBEDDING:
                products[site.name] = LowProduct(kind, 0.03125, balance="all" if site.name == UP else "")
            elif site.weight is None and attention:
                products[site.name] = LowProduct(attention, 0.03125, 0.0625)
    width = next(m for m in matrix_products(models["prefix"].graph) if m.name == UP).weight.shape[1]
    return LowPlan(kind, products, {"all": np.exp2(np.arange(width) % 3 - 1).astype(np.float32)}, "fp16", **more)


def made_by(value, *op_types):
    """What made `value`, one node before the other, of these types."""
    for op_type in op_types:
        node = value.producer()
        assert node is not None and node.op_type == op_type, f"{value.name}: {node}, not {op_type}"
        value = node.inputs[0]
    return value


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_every_product_takes_dequantised_operands_alone(kind, lowered):
    model = lowered["prefix"]
    before = {site.name: site.node.outputs[0].name for site in matrix_products(model.graph)}
    replaced = quantize_static(model, plan_of(kind, lowered, attention="int8" if kind == "int8" else "fp8"))
    gemms = [node for node in model.graph if node.op_type == "Gemm" and node.outputs[0].dtype != ir.DataType.FLOAT]
    assert len(replaced) == len(gemms) == len([name for name in before if not name.endswith(("scores", "values"))])
    for node in gemms:
        left, right = node.inputs
        assert left.dtype == right.dtype == node.outputs[0].dtype == ir.DataType.FLOAT16
        operand = made_by(left, "DequantizeLinear", "QuantizeLinear")
        maker, quantized = operand.producer(), left.producer().inputs[0]
        assert maker is None or maker.op_type != "Cast" or maker.inputs[0].dtype != ir.DataType.FLOAT  # rounded twice
        assert quantized.dtype == LOW[kind]
        scales = [node.inputs[1].const_value.numpy() for node in (quantized.producer(), left.producer())]
        assert scales[0].shape == () and float(scales[0]) == float(scales[1]) == 0.03125
        assert quantized.producer().inputs[1].dtype == operand.dtype and left.producer().inputs[1].dtype == left.dtype
        values = made_by(right, "DequantizeLinear")
        assert values.is_initializer() and values.dtype == LOW[kind] and right.producer().attributes["axis"].value == 0
        assert values.name.removesuffix(".values") not in model.graph.initializers
    products = [node for node in model.graph if node.op_type == "MatMul"]
    assert products and all(
        made_by(value, "DequantizeLinear", "QuantizeLinear") for n in products for value in n.inputs
    )


def test_products_of_one_operand_share_its_rounding(lowered):
    quantize_static(lowered["prefix"], plan_of("fp8", lowered, attention=""))
    users = {
        site.name.rsplit(".", 1)[1]: site.node.inputs[0] for site in _gemms(lowered["prefix"], "backbone.layers.0")
    }
    assert users["q_proj"] is users["k_proj"] is users["v_proj"]
    assert users["gate_proj"] is not users["up_proj"]  # which is balanced


def test_a_balance_is_multiplied_in_before_rounding(lowered):
    plan = plan_of("int8", lowered, attention="")
    quantize_static(lowered["prefix"], plan)
    (up,) = _gemms(lowered["prefix"], UP)
    balanced = up.node.inputs[0].producer().inputs[0].producer().inputs[0]
    factors = balanced.producer().inputs[1].const_value.numpy()
    assert balanced.producer().op_type == "Mul" and balanced.dtype == ir.DataType.FLOAT
    np.testing.assert_array_equal(factors * plan.balances["all"], 1.0)


def _gemms(model, prefix):
    """Products of quantised weights, by the names of their values."""
    for node in model.graph:
        producer = node.inputs[1].producer() if node.op_type == "Gemm" else None
        while producer is not None and producer.op_type == "Cast":
            producer = producer.inputs[0].producer()
        if producer is not None and producer.op_type == "DequantizeLinear":
            name = producer.inputs[0].name.removesuffix(".weight.values")
            if name.startswith(prefix):
                yield type("Site", (), {"name": name, "node": node})


def test_four_bits_have_two_scales_and_rounded_activations(lowered):
    model = lowered["denoise"]
    quantize_static(model, plan_of("nvfp4", lowered))
    assert model.opset_imports[""] == 23 and model.opset_imports["trt"] == 1
    for site in _gemms(model, "expert"):
        left, right = site.node.inputs
        values = made_by(right, "Cast", "DequantizeLinear")
        wide = right.producer().inputs[0].producer()
        assert values.dtype == LOW["nvfp4"] and wide.attributes["block_size"].value == 16
        scales, second = wide.inputs[1].producer().inputs
        assert scales.dtype == LOW["fp8"] and second.dtype == ir.DataType.FLOAT and len(second.shape) == 0
        assert list(scales.shape) == [values.shape[0], values.shape[1] // 16]
        assert made_by(left, "Cast", "DequantizeLinear").producer().op_type == "TRT_FP4DynamicQuantize"
    counts = Counter(node.op_type for node in model.graph)
    assert counts["TRT_FP4DynamicQuantize"] < len(list(_gemms(model, "expert")))  # shared


def test_activations_stay_in_sixteen_bits_without_a_scale(lowered):
    products = {UP: LowProduct("nvfp4", 0.0)}
    quantize_static(lowered["prefix"], LowPlan("nvfp4", products, base="fp16"))
    assert "trt" not in lowered["prefix"].opset_imports
    (site,) = _gemms(lowered["prefix"], UP)
    assert site.node.inputs[0].dtype == ir.DataType.FLOAT16
    assert site.node.inputs[0].producer().op_type == "Cast"


def test_fast_decoding_keeps_weights_of_its_own_unless_the_plan_says_so(lowered):
    plan = plan_of("int8", lowered, attention="")
    forms = quantize_models(lowered, plan, {UP: 2})
    assert f"{UP}.weight" in lowered["fast_decode"].graph.initializers
    assert f"{UP}.weight" not in lowered["prefix"].graph.initializers
    form = forms[checkpoint_key(f"{UP}.weight")]
    assert (form.kind, form.base, form.exponent) == ("int8", "F16", 2) and form.balance is plan.balances["all"]


def test_fast_decoding_takes_the_low_weights_where_the_plan_says_so(lowered):
    quantize_models(lowered, plan_of("int8", lowered, attention="", fast=True), {})
    assert f"{UP}.weight.values" in lowered["fast_decode"].graph.initializers
    assert f"{UP}.weight" not in lowered["fast_decode"].graph.initializers


@pytest.mark.parametrize(
    ("product", "reason"),
    [
        ({"backbone.layers.0.self_attn.scores": LowProduct("nvfp4", 1.0)}, "has no weight: it takes int8 or fp8"),
        ({"backbone.layers.0.self_attn.scores": LowProduct("fp8", 1.0)}, "with a scale for both operands"),
    ],
)
def test_plans_that_do_not_fit(lowered, product, reason):
    with pytest.raises(ExportError, match=f"graph prefix cannot be quantised: .*{reason}"):
        quantize_models(lowered, LowPlan("nvfp4", product, base="fp16"), {})


def test_a_product_that_is_not_lowered_is_refused(data):
    models = trace_all(Checkpoint.open(data / "openpi_a").config, DecodeVocabulary(0, 64), 20)
    with pytest.raises(ExportError, match=f"{UP} is in FLOAT, not in the plan's fp16"):
        quantize_models(models, LowPlan("int8", {UP: LowProduct("int8", 1.0)}, base="fp16"), {})


# ---------------------------------------------------------------------- the numbers, decoded by ml_dtypes


def decoded(weights, key, kind, base=np.float16):
    """A low weight as float64 [out, in], read as ONNX defines it."""
    raw = {
        part: np.concatenate([piece.reshape(-1) for piece in weights.pieces(key, part)]) for part in (VALUES, SCALES)
    }
    shape = weights.layout(key, VALUES)[1]
    if kind == "nvfp4":
        bits = np.stack([raw[VALUES] & 15, raw[VALUES] >> 4], -1).reshape(shape[0], -1)
        values = bits.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
        scales = raw[SCALES].view(ml_dtypes.float8_e4m3fn).astype(np.float64).reshape(shape[0], -1)
        (second,) = weights.pieces(key, SECOND)
        return values * scales.repeat(16, 1) * float(second.view(np.float32)[0])
    types = {"int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn}
    values = raw[VALUES].view(types[kind]).astype(np.float64).reshape(shape)
    return values * raw[SCALES].view(base).astype(np.float64)[:, None]


@pytest.mark.parametrize("kind", KINDS)
def test_stored_weights_are_the_checkpoints_but_for_rounding(kind, source):
    key = checkpoint_key(f"{UP}.weight")
    wanted = source.array(key).astype(np.float64)
    weights = LowWeights(source, {key: LowForm(kind)})
    given = decoded(weights, key, kind)
    largest = np.abs(wanted).max(1, keepdims=True)
    if kind == "nvfp4":
        largest = np.abs(wanted.reshape(len(wanted), -1, 16)).max(2).repeat(16, 1)
    step = {"int8": 0.51 / 127, "fp8": 1 / 24, "nvfp4": 1 / 5}[kind]  # half the widest gap of the kind, of the largest
    assert np.all(np.abs(given - wanted) <= step * largest)
    assert np.linalg.norm(given - wanted) / np.linalg.norm(wanted) < {"int8": 1e-2, "fp8": 3e-2, "nvfp4": 0.12}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_exponents_and_balances_are_undone(kind, source):
    """W * b / 2^k, rounded, with powers of two: nothing but the place of the rounding changes."""
    key = checkpoint_key(f"{UP}.weight")
    balance = np.exp2(np.arange(source.tensors[key].shape[1]) // 16 % 3).astype(np.float32)
    form = LowForm(kind, exponent=-3, balance=balance)
    given = decoded(LowWeights(source, {key: form}), key, kind) / balance / 8.0
    wanted = source.array(key)
    assert np.linalg.norm(given - wanted) / np.linalg.norm(wanted) < {"int8": 2e-2, "fp8": 3e-2, "nvfp4": 0.12}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_a_parameter(kind, source):
    key = checkpoint_key(f"{UP}.weight")
    weights = LowWeights(source, {key: LowForm(kind)})
    rows, columns = source.tensors[key].shape
    values = sum(piece.nbytes for piece in weights.pieces(key, VALUES))
    scales = sum(piece.nbytes for piece in weights.pieces(key, SCALES))
    assert values + scales - (0 if kind == "nvfp4" else 2 * rows) == BITS[kind] / 8 * rows * columns


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_in_pieces_is_the_weight(kind, source, monkeypatch):
    key = checkpoint_key(f"{UP}.weight")
    whole = LowWeights(source, {key: LowForm(kind)})
    for part in (VALUES, SCALES):
        (expected,) = whole.pieces(key, part)
        found = [whole.part(key, part, start, start + 1).reshape(-1) for start in range(source.tensors[key].shape[0])]
        np.testing.assert_array_equal(np.concatenate(found), expected.reshape(-1))


def test_bfloat16_scales(source):
    key = checkpoint_key(f"{UP}.weight")
    weights = LowWeights(source, {key: LowForm("int8", base="BF16")})
    (raw,) = weights.pieces(key, SCALES)
    scales = torch.from_numpy(raw.copy()).view(torch.bfloat16).double()
    largest = torch.from_numpy(source.array(key)).abs().amax(1).double()
    assert bool((scales * 127 >= largest).all()) and bool((scales * 126 <= largest).all())
