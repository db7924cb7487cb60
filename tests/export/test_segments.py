"""Graphs in pieces: every node once, whole layers, the same numbers, and no more weights open than allowed."""

import shutil
from collections import Counter
from functools import partial

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ki_edge import graphs
from ki_edge.bundle import Bundle, BundleWriter
from ki_edge.errors import BackendError, BundleError, ExportError
from ki_export.parity import segments
from ki_export.parity.cutting import LAYER, cut
from ki_export.parity.segments import SegmentedSession, SegmentPool, run_segments
from ki_runtime.backends.registry import SessionOptions, choose_backend, open_session

from .conftest import CONFIG

RANDOM = np.random.default_rng(0)
KV = (CONFIG.backbone.depth, 2, CONFIG.backbone.num_kv_heads, 7, CONFIG.backbone.head_dim)
MASK = np.arange(7) < np.array([[7], [4]])


def floats(*shape):
    return RANDOM.standard_normal(shape, np.float32)


FEEDS = {
    "prefix": {
        "images": RANDOM.integers(0, 256, (2, 2, 14, 14, 3), np.uint8),
        "camera_mask": np.array([[True, True], [True, False]]),
        "prompt_tokens": RANDOM.integers(2, 640, (2, 5)).astype(np.int32),
        "prompt_mask": np.arange(5) < np.array([[5], [3]]),
    },
    "denoise": {
        "x_t": floats(2, 5, 6),
        "modulation": floats(*CONFIG.modulation_shape),
        "dt": np.array(-0.1, np.float32),
        "prefix_k": floats(*KV),
        "prefix_v": floats(*KV),
        "prefix_mask": MASK,
    },
    "fast_decode": {
        "tokens": np.array([[5, 6, 7], [8, 9, 10]], np.int32),
        "positions": np.array([[6, 7, 8], [3, 4, 5]], np.int32),
        "cache_k": floats(*KV),
        "cache_v": floats(*KV),
        "cache_mask": MASK,
    },
}


def loaded(bundle, graph):
    return onnx.load(bundle.graph(graph), load_external_data=False)


def weights(model):
    return {t.name for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL}


@pytest.mark.parametrize("graph", list(FEEDS))
@pytest.mark.parametrize("limit", [0, 5_000, 10**9])
def test_segments_are_the_graph(bundle, graph, limit):
    """Every node is in one segment, and what a segment reads was made before it."""
    model = loaded(bundle, graph)
    parts = cut(model, limit)
    nodes = Counter(node.SerializeToString() for part in parts for node in part.model.graph.node)
    assert nodes == Counter(node.SerializeToString() for node in model.graph.node)
    known = {value.name for value in model.graph.input}
    for part in parts:
        assert set(part.inputs) <= known
        known |= set(part.outputs)
    assert {value.name for value in model.graph.output} <= known
    assert len(parts) == 1 if limit == 10**9 else len(parts) > 2


@pytest.mark.parametrize("graph", list(FEEDS))
def test_a_segment_holds_whole_layers(bundle, graph):
    parts = cut(loaded(bundle, graph), limit=0)
    layers = [{m[0] for name in weights(part.model) if (m := LAYER.match(name))} for part in parts]
    assert all(len(found) <= 1 for found in layers)
    names = [name for found in layers for name in found]
    assert len(names) == len(set(names)) >= CONFIG.backbone.depth


@pytest.mark.parametrize("graph", list(FEEDS))
@pytest.mark.parametrize("limit", [0, 5_000])
def test_a_segmented_session_gives_what_the_whole_graph_gives(bundle, monkeypatch, graph, limit):
    monkeypatch.setattr(segments, "cut", partial(cut, limit=limit))
    spec = next(spec for spec in graphs.specs(CONFIG) if spec.name == graph)
    session = SegmentedSession(bundle, spec, SegmentPool(bundle.path, budget=0))
    whole = open_session(bundle, spec, choose_backend("ort"), SessionOptions())
    assert len(session.segments) > 2
    first = FEEDS[graph]
    mask = next(name for name in first if name.endswith("mask"))
    for feeds in (first, first, {**first, mask: np.ones_like(first[mask])}, first):
        ours, theirs = session.run(feeds), whole.run(feeds)
        for name, expected in theirs.items():
            np.testing.assert_allclose(ours[name], expected, rtol=0, atol=2e-6 * max(1, np.abs(expected).max()))


def test_sessions_are_kept_within_the_budget(bundle):
    parts = cut(loaded(bundle, "denoise"), limit=0)
    sizes = [part.nbytes for part in parts]
    for budget, most in ((0, 1), (sum(sizes), len(parts)), (sizes[0] + sizes[1], 2)):
        pool, opened = SegmentPool(bundle.path, budget), []
        for _ in run_segments(parts, pool, FEEDS["denoise"]):
            opened.append(len(pool._open))
            assert len(pool._open) == 1 or sum(part.nbytes for part in pool._open) <= budget
        assert max(opened) == most


def test_a_graph_does_not_run_again_with_the_same_inputs(bundle):
    seen = []
    session = SegmentedSession(bundle, graphs.PREFIX, SegmentPool(bundle.path, on_run=seen.append))
    first, feeds = session.run(FEEDS["prefix"]), {name: value.copy() for name, value in FEEDS["prefix"].items()}
    first["prefix_k"][:] = 0  # the caller's to change
    again = session.run(feeds)
    assert seen == ["prefix"] and again["prefix_k"].any()
    feeds["prompt_tokens"][0, 0] += 1
    assert not np.array_equal(session.run(feeds)["prefix_k"], again["prefix_k"]) and len(seen) == 2


def test_progress_names_every_segment_in_order(bundle):
    seen = []
    parts = cut(loaded(bundle, "prefix"), limit=0)
    for _ in run_segments(parts, SegmentPool(bundle.path, on_run=seen.append), FEEDS["prefix"]):
        pass
    assert seen == [f"prefix part {at} of {len(parts)}" for at in range(1, len(parts) + 1)]


def write_stack(folder, *, first=False):
    """Three linear layers over bfloat16 weights that a Cast widens: the Casts all `first`, or each where it is used."""
    weights, casts, layers, data = [], [], [], b""
    for i in range(3):
        values = (RANDOM.standard_normal((8, 8)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        tensor = TensorProto(name=f"layers.{i}.w", dims=[8, 8], data_type=TensorProto.BFLOAT16)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "w.bin"), ("offset", len(data)), ("length", values.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        data += values.tobytes()
        weights.append(tensor)
        casts.append(helper.make_node("Cast", [tensor.name], [f"wide{i}"], to=TensorProto.FLOAT))
        layers.append(helper.make_node("MatMul", [f"x{i}", f"wide{i}"], [f"x{i + 1}"]))
    (folder / "w.bin").write_bytes(data)
    nodes = [*casts, *layers] if first else [node for pair in zip(casts, layers, strict=True) for node in pair]
    value = partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT, shape=["n", 8])
    graph = helper.make_graph(nodes, "stack", [value("x0")], [value("x3")], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize("first", [True, False])
def test_widened_weights_are_computed_where_they_are_used(tmp_path, first):
    """Even where all Casts come first: else every float32 weight would lie between segments."""
    model = write_stack(tmp_path, first=first)
    parts = cut(model, limit=0)
    assert [part.inputs for part in parts] == [("x0",), ("x1",), ("x2",)]
    assert [part.nbytes for part in parts] == [64 * 6] * 3
    x = floats(2, 8)
    *_, (made, _) = run_segments(parts, SegmentPool(tmp_path), {"x0": x})
    whole = segments.load(model, tmp_path).run(None, {"x0": x})[0]
    np.testing.assert_allclose(made["x3"], whole, rtol=1e-6)


def test_int8_weights_are_cut_by_layer():
    """Weights of a layer in two initializers, as an int8 graph has them."""
    nodes, tensors = [], []
    for i in range(2):
        steps = numpy_helper.from_array(RANDOM.integers(-9, 9, (8, 8)).astype(np.int8), f"layers.{i}.w.weight.int8")
        scale = numpy_helper.from_array(np.full(8, 0.1, np.float32), f"layers.{i}.w.weight.scale")
        for tensor in (steps, scale):
            tensor.data_location = TensorProto.EXTERNAL
        tensors += [steps, scale]
        nodes += [
            helper.make_node("DynamicQuantizeLinear", [f"x{i}"], [f"q{i}", f"s{i}", f"z{i}"]),
            helper.make_node("MatMulInteger", [f"q{i}", steps.name, f"z{i}"], [f"y{i}"]),
            helper.make_node("Cast", [f"y{i}"], [f"f{i}"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"s{i}", scale.name], [f"t{i}"]),
            helper.make_node("Mul", [f"f{i}", f"t{i}"], [f"x{i + 1}"]),
        ]
    value = partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT, shape=["n", 8])
    model = helper.make_model(helper.make_graph(nodes, "int8", [value("x0")], [value("x2")], tensors))
    parts = cut(model, limit=0)
    assert [sorted(weights(part.model)) for part in parts] == [
        [f"layers.{i}.w.weight.int8", f"layers.{i}.w.weight.scale"] for i in range(2)
    ]
    assert [part.nbytes for part in parts] == [64 + 4 * 8] * 2
    assert parts[0].outputs == ("x1", "q1", "s1", "z1") or set(parts[1].inputs) <= {"x1", "q1", "s1", "z1"}


def test_rows_that_are_gathered_are_not_counted(bundle):
    """The prefix graph's first segment reads a few rows of the embedding table, not the table."""
    for part in cut(loaded(bundle, "prefix"), limit=0):
        if "backbone.embed_tokens.weight" in weights(part.model):
            assert part.nbytes < 4 * CONFIG.vocab_size * CONFIG.backbone.width
            return
    raise AssertionError("no segment reads the embedding table")


def test_a_value_of_unknown_type_between_segments(tmp_path):
    model = write_stack(tmp_path)
    model.graph.node[1].domain = "nobody.knows"
    model.opset_import.append(helper.make_opsetid("nobody.knows", 1))
    with pytest.raises(ExportError, match="type of its value 'x1'"):
        cut(model, limit=0)


def test_a_graph_that_the_engine_refuses_is_named(bundle, tmp_path):
    model = write_stack(tmp_path)
    model.graph.node[1].op_type = "Nonsense"
    with pytest.raises(BackendError, match="stack part 1 of 3"):
        next(run_segments(cut_types(model), SegmentPool(tmp_path), {"x0": floats(1, 8)}))


def cut_types(model):
    """Segments of a model whose values' types are written down."""
    for i in (1, 2):
        model.graph.value_info.append(helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, None))
    return cut(model, limit=0)


def test_a_graph_of_another_policy_is_refused(bundle, tmp_path):
    """The whole graph is loaded once, and its signature is checked as the runtime checks it."""
    copy = Bundle.open(shutil.copytree(bundle.path, tmp_path / "bundle"))
    path = copy.graph("denoise")
    model = onnx.load(path, load_external_data=False)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 99
    del model.graph.value_info[:]
    path.write_bytes(model.SerializeToString())
    copy = BundleWriter(copy.path).seal(copy.manifest)
    with pytest.raises((BundleError, BackendError), match="denoise"):
        SegmentedSession(copy, graphs.DENOISE, SegmentPool(copy.path))
    path.write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"denoise\.onnx is not a readable ONNX graph"):
        SegmentedSession(copy, graphs.DENOISE, SegmentPool(copy.path))
