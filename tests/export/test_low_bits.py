"""Eight and four bits: against ml_dtypes, ONNX's own reference implementation, and products in whole numbers."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from ki_edge.errors import ExportError
from ki_export.arithmetic.evaluator import Evaluator
from ki_export.arithmetic.low_bits import E2M1, EXACT, LowOperand, low_product
from ki_export.arithmetic.readers import FileWeights
from ki_export.weights.rounding import BLOCK, KINDS, round_e2m1, round_e4m3, round_weight, scale_of

RNG = np.random.default_rng(0)
LOW = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN, "fp4": TensorProto.FLOAT4E2M1}
NUMPY = {"int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn, "fp4": ml_dtypes.float4_e2m1fn}
TIES = np.arange(-600, 600, 1 / 16)
VALUES = np.concatenate([TIES, TIES / 64, *(RNG.standard_normal(20000) * s for s in (1e-3, 0.1, 10, 300))])
VALUES = np.concatenate([VALUES, [0.0, -0.0, 448, 464, 465, 1e30, -1e30, np.inf, 2**-10, 2**-9, 3 * 2**-11]])


class Nothing:
    def part(self, value, *_):
        raise AssertionError(f"{value.name} was asked for")

    rows = part


def graph(nodes, inputs, constants, output_type, opset=23):
    types = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int8": TensorProto.INT8}
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, types[str(a.dtype)], a.shape) for n, a in inputs.items()],
        [helper.make_tensor_value_info("y", output_type, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("trt", 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=11)


def evaluate(proto, inputs, *, fuse=True, output="y"):
    (found,) = Evaluator(ir.from_proto(proto).graph, Nothing(), fuse=fuse).run(
        [{name: torch.from_numpy(array) for name, array in inputs.items()}]
    )
    return found[output]


def as_float(array):
    return np.asarray(array).astype(np.float32)


def test_numbers_are_those_of_ml_dtypes():
    given = VALUES.astype(np.float32)
    held = np.clip(given, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(round_e4m3(torch.from_numpy(given)).numpy(), as_float(held))
    four = given.astype(ml_dtypes.float4_e2m1fn)
    np.testing.assert_array_equal(round_e2m1(torch.from_numpy(given)).numpy(), as_float(four))


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("scales", ["one", "rows", "columns", "blocks"])
def test_quantize_and_dequantize_are_those_of_onnx(low, dtype, scales):
    x = (RNG.standard_normal((6, 2 * BLOCK)) * 3).astype(dtype)
    shape = {"one": (), "rows": (6,), "columns": (2 * BLOCK,), "blocks": (6, 2)}[scales]
    scale = (2.0 ** RNG.integers(-6, 1, shape) * RNG.uniform(0.5, 1, shape)).astype(dtype)
    more = {"rows": {"axis": 0}, "columns": {"axis": -1}, "blocks": {"axis": 1, "block_size": BLOCK}}.get(scales, {})
    quantize = helper.make_node("QuantizeLinear", ["x", "s"], ["q"], output_dtype=LOW[low], **more)
    restore = helper.make_node("DequantizeLinear", ["q", "s"], ["y"], **more)
    for nodes, output, kind in (([quantize], "q", LOW[low]), ([quantize, restore], "y", None)):
        proto = graph(nodes, {"x": x}, {"s": np.asarray(scale)}, TensorProto.UNDEFINED)
        proto.graph.output[0].name = output
        proto.graph.output[0].ClearField("type")
        (expected,) = ReferenceEvaluator(proto).run(None, {"x": x})
        given = evaluate(proto, {"x": x}, output=output)
        np.testing.assert_array_equal(given.float().numpy(), as_float(expected))
        assert kind is not None or given.numpy().dtype == expected.dtype


def test_zero_points_other_than_zero_are_refused():
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])
    constants = {"s": np.float32(0.1), "z": np.array(3, np.int8)}
    proto = graph([node], {"x": np.ones(4, np.float32)}, constants, TensorProto.INT8)
    with pytest.raises(ExportError, match="zero point"):
        evaluate(proto, {"x": np.ones(4, np.float32)})


def product(low, width, dtype, second=False):
    """Gemm of an operand that is quantised and a weight with a scale an output, and the numbers in it."""
    x = RNG.standard_normal((5, width)).astype(np.float32)
    weight = (RNG.standard_normal((7, width)) * 20).clip(-6 if second else -127, 6 if second else 127)
    weight = weight.round().astype(NUMPY[low])
    scale, scales = np.array(0.03, dtype), (RNG.uniform(0.5, 1, 7) / 50).astype(dtype)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s32"], ["q"], output_dtype=LOW[low]),
        helper.make_node("DequantizeLinear", ["q", "s"], ["a"]),
        helper.make_node("DequantizeLinear", ["w", "t"], ["b"], axis=0),
        helper.make_node("Gemm", ["a", "b"], ["y"], transB=1),
    ]
    constants = {"s": scale, "s32": scale.astype(np.float32), "w": weight, "t": scales}
    out = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16}[dtype]
    return graph(nodes, {"x": x}, constants, out), {"x": x}, weight, scale, scales


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("width", [64, 3 * EXACT + 8])
def test_int8_products_are_summed_in_whole_numbers(width, dtype):
    proto, inputs, weight, scale, scales = product("int8", width, dtype)
    q = np.clip(np.rint(inputs["x"] / scale.astype(np.float32)), -128, 127).astype(np.int64)
    total = (q @ weight.T.astype(np.int64)).astype(np.float32)
    expected = total * (scale.astype(np.float32) * scales.astype(np.float32))
    np.testing.assert_array_equal(evaluate(proto, inputs).numpy(), expected.astype(dtype))


def test_a_whole_sum_beyond_float32_is_exact():
    """127 * 127 * 4096 and one more: float32 has no such number, so its sum would depend on the order."""
    high, one = np.full((1, 4 * EXACT), 127, np.int8), np.full((1, 4 * EXACT), 127, np.int8)
    one[0, -1] = 126
    a = LowOperand(torch.from_numpy(high).float(), torch.tensor(1.0), whole=True)
    b = LowOperand(torch.from_numpy(one).float().T, torch.tensor(1.0), whole=True)
    expected = np.float32(127 * 127 * 4 * EXACT - 127)
    assert low_product(a, b, torch.float32).item() == expected


@pytest.mark.parametrize("low", ["int8", "fp8"])
def test_node_by_node_differs_by_rounding_only(low):
    proto, inputs, *_ = product(low, 256, np.float16)
    whole, nodes = evaluate(proto, inputs).float(), evaluate(proto, inputs, fuse=False).float()
    assert 0 < (whole - nodes).norm() < 1e-3 * whole.norm()
    proto, inputs, *_ = product(low, 256, np.float32)
    torch.testing.assert_close(evaluate(proto, inputs), evaluate(proto, inputs, fuse=False), rtol=2e-6, atol=1e-4)


def four_bits(dtype=np.float16):
    """The nodes of a product in nvfp4, as TensorRT takes them."""
    x, weight = (RNG.standard_normal(shape).astype(np.float32) for shape in ((5, 4 * BLOCK), (7, 4 * BLOCK)))
    low, second = round_weight(torch.from_numpy(weight), "nvfp4"), np.float32(4 / (6 * 448))
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node(
            "TRT_FP4DynamicQuantize", ["h", "g"], ["q", "s"], domain="trt", axis=-1, block_size=BLOCK, scale_type=17
        ),
        helper.make_node("DequantizeLinear", ["s", "g"], ["sd"]),
        helper.make_node("DequantizeLinear", ["q", "sd"], ["a32"], axis=-1, block_size=BLOCK),
        helper.make_node("Cast", ["a32"], ["a"], to=TensorProto.FLOAT16),
        helper.make_node("DequantizeLinear", ["ws", "wg"], ["wd"]),
        helper.make_node("DequantizeLinear", ["w", "wd"], ["b32"], axis=1, block_size=BLOCK),
        helper.make_node("Cast", ["b32"], ["b"], to=TensorProto.FLOAT16),
        helper.make_node("Gemm", ["a", "b"], ["y"], transB=1),
    ]
    constants = {
        "g": np.array(second),
        "w": low.values.numpy().astype(ml_dtypes.float4_e2m1fn),
        "ws": low.scales.numpy().astype(ml_dtypes.float8_e4m3fn),
        "wg": low.second.numpy(),
    }
    return graph(nodes, {"x": x}, constants, TensorProto.FLOAT16), x, low, second


def test_nvfp4_products_are_those_of_its_definition():
    proto, x, low, second = four_bits()
    blocks = x.astype(np.float16).astype(np.float32).reshape(5, -1, BLOCK)
    scales = (np.abs(blocks).max(-1) / (6 * second)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    values = (blocks / (scales * second)[..., None]).astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
    operand = (values * scales[..., None] * second).reshape(5, -1)
    weight = (low.values.reshape(7, -1, BLOCK) * low.scales[..., None] * low.second).reshape(7, -1).numpy()
    given = evaluate(proto, {"x": x}).numpy()
    np.testing.assert_allclose(given, operand @ weight.T.astype(np.float64), rtol=2**-10, atol=1e-4)
    literal = evaluate(proto, {"x": x}, fuse=False).numpy()
    np.testing.assert_allclose(given, literal, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_close_and_use_all_of_the_range(kind):
    weight = torch.from_numpy(RNG.standard_normal((32, 8 * BLOCK)).astype(np.float32))
    weight[3] = 0
    low = round_weight(weight, kind)
    factor = low.factor[:, None] if low.factor.ndim else low.factor
    restored = low.unscaled * factor
    assert (restored - weight).norm() / weight.norm() < {"int8": 0.01, "fp8": 0.03, "nvfp4": 0.1}[kind]
    assert not restored[3].any()
    if kind != "nvfp4":
        np.testing.assert_array_equal(low.scales.numpy(), low.scales.half().float().numpy())
        limit = {"int8": 127, "fp8": 448}[kind]
        biggest = low.values.abs().amax(1)[weight.abs().amax(1) > 0]
        assert (biggest <= limit).all() and (biggest > 0.92 * limit).all()


def test_scales_are_of_both_16_bit_types_and_never_saturate():
    clips = torch.logspace(-7, 5, 500)
    for kind in ("int8", "fp8"):
        scales = scale_of(clips, kind)
        assert torch.equal(scales, scales.half().float())
        assert torch.equal(scales, scales.bfloat16().float())
        assert (clips / scales <= {"int8": 127, "fp8": 448}[kind] * (1 + 1e-6)).all()


def test_packed_four_bits_are_read_from_a_file(tmp_path):
    """Two numbers a byte, the first in the low half, as ONNX packs them."""
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32).reshape(2, 8)
    tensor = onnx.numpy_helper.from_array(numbers.astype(ml_dtypes.float4_e2m1fn))
    assert len(tensor.raw_data) == 8
    (tmp_path / "w").write_bytes(b"ab" + tensor.raw_data)
    shape, dtype = ir.Shape([2, 8]), ir.DataType.FLOAT4E2M1
    value = ir.Value(name="w", type=ir.TensorType(dtype), shape=shape)
    value.const_value = ir.ExternalTensor("w", 2, 8, dtype, shape=shape, name="w", base_dir=tmp_path)
    whole = FileWeights(tmp_path).part(value, 0, 2)
    assert whole.dtype == E2M1
    np.testing.assert_array_equal(whole.float().numpy(), numbers)
    np.testing.assert_array_equal(FileWeights(tmp_path).part(value, 1, 2).float().numpy(), numbers[1:])
