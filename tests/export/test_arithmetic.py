"""The evaluator: against ONNX Runtime in float32, and against ONNX's own reference implementation in float16."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from ki_edge import graphs
from ki_edge.errors import BundleError, ExportError
from ki_export.arithmetic import evaluator
from ki_export.arithmetic.evaluator import Evaluator, Shelf
from ki_export.arithmetic.readers import FileWeights
from ki_export.arithmetic.session import arithmetic_sampler, arithmetic_sessions
from ki_export.parity.cases import standard_cases
from ki_runtime.policy.sampler import Sampler

RNG = np.random.default_rng(0)


class Nothing:
    def part(self, value, *_):
        raise AssertionError(f"{value.name} was asked for")

    rows = part


def model(nodes, inputs, outputs=("y",), constants=()):
    """An ONNX model: inputs name -> array, constants name -> array."""
    types = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int64": TensorProto.INT64}
    types |= {"bool": TensorProto.BOOL, "int32": TensorProto.INT32, "uint8": TensorProto.UINT8}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, types[str(a.dtype)], a.shape) for n, a in inputs.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [onnx.numpy_helper.from_array(array, name) for name, array in dict(constants).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def evaluate(proto, inputs, outputs=("y",)):
    graph = ir.from_proto(proto).graph
    (found,) = Evaluator(graph, Nothing()).run([{n: torch.from_numpy(a) for n, a in inputs.items()}])
    return [found[name].numpy() for name in outputs]


def f(*shape, dtype=np.float32, scale=1.0):
    return (RNG.standard_normal(shape) * scale).astype(dtype)


I64 = np.int64
CASES = {
    "Add": ([f(3, 4), f(4)], {}),
    "Sub": ([f(3, 4), f(3, 1)], {}),
    "Mul": ([f(3, 4), f(4)], {}),
    "Div": ([f(3, 4), f(4) + 3], {}),
    "MatMul": ([f(2, 3, 4), f(2, 4, 5)], {}),
    "Gemm": ([f(3, 4), f(5, 4), f(5)], {"transB": 1}),
    "Pow": ([np.abs(f(3, 4)), np.array(2.0, np.float32)], {}),
    "Sqrt": ([np.abs(f(3, 4))], {}),
    "Sigmoid": ([f(3, 4)], {}),
    "Neg": ([f(3, 4)], {}),
    "Cos": ([f(3, 4)], {}),
    "Sin": ([f(3, 4)], {}),
    "Gelu": ([f(3, 4)], {"approximate": "tanh"}),
    "Softmax": ([f(3, 4)], {"axis": -1}),
    "Where": ([f(3, 4) > 0, f(3, 4), np.array(-1.0, np.float32)], {}),
    "LessOrEqual": ([np.arange(3), np.arange(3)[::-1].copy()], {}),
    "LayerNormalization": ([f(3, 4), f(4), f(4)], {"axis": -1, "epsilon": 1e-6}),
    "Conv": ([f(2, 3, 8, 8), f(5, 3, 4, 4), f(5)], {"strides": [4, 4]}),
    "ReduceMean": ([f(3, 4), np.array([-1], I64)], {"keepdims": 1}),
    "ReduceSum": ([np.arange(12).reshape(3, 4), np.array([1], I64)], {"keepdims": 0}),
    "CumSum": ([np.arange(12).reshape(3, 4), np.array(1, I64)], {}),
    "Shape": ([f(3, 4, 5)], {"start": 1, "end": 3}),
    "Range": ([np.array(2, I64), np.array(9, I64), np.array(3, I64)], {}),
    "Expand": ([f(3, 1), np.array([2, 1, 4], I64)], {}),
    "Reshape": ([f(3, 4), np.array([0, -1, 2], I64)], {}),
    "Transpose": ([f(3, 4, 5)], {"perm": [2, 0, 1]}),
    "Concat": ([f(3, 4), f(3, 2)], {"axis": 1}),
    "Unsqueeze": ([f(3, 4), np.array([0, -1], I64)], {}),
    "Squeeze": ([f(3, 1, 4), np.array([1], I64)], {}),
    "Slice": ([f(5, 6), *(np.array([i], I64) for i in (1, 5, 1, 2))], {}),
    "Gather": ([f(5, 6), np.array([[0, -1], [3, 2]], I64)], {"axis": 1}),
    "Cast": ([f(3, 4, scale=10)], {"to": TensorProto.INT32}),
}


@pytest.mark.parametrize("op", CASES)
def test_each_operator_is_that_of_onnx(op):
    arrays, attributes = CASES[op]
    inputs = {f"x{i}": array for i, array in enumerate(arrays)}
    proto = model([helper.make_node(op, list(inputs), ["y"], **attributes)], inputs)
    (expected,) = ReferenceEvaluator(proto).run(None, inputs)
    (given,) = evaluate(proto, inputs)
    assert given.dtype == expected.dtype and given.shape == expected.shape
    np.testing.assert_allclose(given, expected, rtol=2e-6, atol=2e-6)


def test_split_gives_every_part():
    inputs = {"x": f(3, 7)}
    proto = model([helper.make_node("Split", ["x"], ["a", "b"], axis=1, num_outputs=2)], inputs, ("a", "b"))
    expected = ReferenceEvaluator(proto).run(None, inputs)
    for given, wanted in zip(evaluate(proto, inputs, ("a", "b")), expected, strict=True):
        np.testing.assert_array_equal(given, wanted)


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_is_that_of_onnx(heads):
    inputs = {"q": f(2, 4, 5, 8), "k": f(2, heads, 6, 8), "v": f(2, heads, 6, 8), "mask": f(2, 1, 5, 6)}
    node = helper.make_node("Attention", list(inputs), ["y"], scale=0.3)
    proto = model([node], inputs)
    del proto.opset_import[:]
    proto.opset_import.append(helper.make_opsetid("", 23))
    (expected,) = ReferenceEvaluator(proto).run(None, inputs)[:1]
    np.testing.assert_allclose(evaluate(proto, inputs)[0], expected, rtol=1e-5, atol=1e-6)


def test_float16_rounds_and_overflows():
    inputs = {"a": np.array([60000, 1.0, 2048], np.float16), "b": np.array([60000, 2**-11, 1], np.float16)}
    proto = model([helper.make_node("Add", ["a", "b"], ["y"])], inputs)
    (given,) = evaluate(proto, inputs)
    np.testing.assert_array_equal(given, np.array([np.inf, 1.0, 2048], np.float16))


def test_a_float16_product_is_summed_in_float32_and_rounded_once():
    inputs = {"a": f(5, 300, dtype=np.float16), "b": f(300, 7, dtype=np.float16)}
    (given,) = evaluate(model([helper.make_node("MatMul", ["a", "b"], ["y"])], inputs), inputs)
    exact = inputs["a"].astype(np.float64) @ inputs["b"].astype(np.float64)
    assert given.dtype == np.float16
    np.testing.assert_allclose(given, exact, rtol=2**-10, atol=1e-3)
    big = {"a": np.full((1, 2), 300, np.float16), "b": np.full((2, 1), 300, np.float16)}
    assert np.isinf(evaluate(model([helper.make_node("MatMul", ["a", "b"], ["y"])], big), big)[0]).all()


def test_operands_of_two_types_are_refused():
    inputs = {"a": f(2), "b": f(2, dtype=np.float16)}
    with pytest.raises(ExportError, match=r"Add 'y': Add of torch.float32 and torch.float16"):
        evaluate(model([helper.make_node("Add", ["a", "b"], ["y"])], inputs), inputs)


def test_an_unknown_operator_is_named():
    inputs = {"a": f(2)}
    with pytest.raises(ExportError, match="Erf is not one of ours"):
        evaluate(model([helper.make_node("Erf", ["a"], ["y"])], inputs), inputs)


def test_the_whole_runtime_over_it_is_onnx_runtime(bundle):
    engine, exact = Sampler.open(bundle, "ort"), arithmetic_sampler(bundle)
    for case in standard_cases(bundle.manifest.config, cameras=2, max_prompt=20, num_steps=4, forced=(3, 5)):
        for sampler in (engine, exact):
            sampler.found = (
                sampler.sample_actions(*case.inputs, noise=case.noise),
                sampler.sample_fast_tokens(*case.inputs, max_tokens=5, forced=case.forced),
            )
        np.testing.assert_allclose(exact.found[0], engine.found[0], atol=5e-6)
        np.testing.assert_array_equal(exact.found[1], engine.found[1])


def test_several_observations_side_by_side_are_each_alone(bundle):
    session = arithmetic_sessions(bundle)(graphs.PREFIX)
    cases = standard_cases(bundle.manifest.config, cameras=2, max_prompt=20, num_steps=4, forced=())
    feeds = [
        dict(zip([t.name for t in session.inputs], map(torch.from_numpy, case.inputs), strict=True)) for case in cases
    ]
    for feed in feeds:
        feed["prompt_tokens"] = feed["prompt_tokens"].int()
    together = session._evaluator.run(feeds)
    for feed, found in zip(feeds, together, strict=True):
        (alone,) = session._evaluator.run([feed])
        assert all(torch.equal(found[name], alone[name]) for name in alone)


def test_a_shelf_holds_no_more_than_its_budget(bundle):
    graph = ir.load(bundle.graph("prefix")).graph
    shelf = Shelf(FileWeights(bundle.path), budget=5000)
    read = [v for v in graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)]
    for value in read:
        shelf.part(value, 0, value.shape[0])
        assert sum(tensor.nbytes for tensor in shelf._held.values()) <= 5000


def test_a_weights_file_that_ends_early_is_told(bundle, tmp_path):
    graph = ir.load(bundle.graph("prefix")).graph
    value = graph.initializers["projector.weight"]
    (tmp_path / "weights.safetensors").write_bytes(b"0" * 100)
    with pytest.raises(BundleError, match=r"ends before 'projector\.weight'"):
        FileWeights(tmp_path).part(value, 0, value.shape[0])


def test_a_large_weight_is_used_in_parts(bundle, monkeypatch):
    """The unembedding of all tokens is a gigabyte."""
    spec, graph = graphs.FAST_DECODE, ir.load(bundle.graph("fast_decode")).graph
    rng, sizes = np.random.default_rng(0), {**arithmetic_sessions(bundle)(spec).sizes, "B": 1, "Q": 3, "C": 6}
    feed = {}
    for tensor in spec.inputs:
        shape = [dim if isinstance(dim, int) else sizes[dim] for dim in tensor.dims]
        values = rng.standard_normal(shape) if tensor.dtype == "float32" else rng.integers(0, 2, shape)
        feed[tensor.name] = torch.from_numpy(values.astype(tensor.dtype))
    (whole,) = Evaluator(graph, FileWeights(bundle.path)).run([feed])
    monkeypatch.setattr(evaluator, "PART", 700)
    seen = []
    (parts,) = Evaluator(graph, FileWeights(bundle.path)).run([feed], lambda node, x, y: seen.append(x))
    assert max(tensor.nbytes for x in seen for tensor in x if tensor is not None and tensor.ndim == 2) <= 1500
    for name, expected in whole.items():
        np.testing.assert_allclose(parts[name], expected, rtol=1e-5, atol=1e-6)
