"""What the three graphs consist of."""

import shutil
from functools import partial

import onnx
import onnx_ir as ir
import pytest

from ki_edge import flow, graphs
from ki_edge.bundle import Bundle, BundleWriter
from ki_edge.errors import BackendError, BundleError
from ki_export import exporter
from ki_export.graphs.checker import check
from ki_runtime.backends.backend import SessionOptions
from ki_runtime.backends.registry import choose_backend, open_session

from .conftest import CONFIG, OFFSET

COMMON = {
    "Add", "Cast", "Concat", "Cos", "Div", "Gather", "Gelu", "Gemm", "MatMul", "Mul", "Neg", "Pow", "ReduceMean",
    "Reshape", "Shape", "Sin", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
ALLOWED = {
    "prefix": COMMON | {"Conv", "ReduceSum", "Range", "LessOrEqual", "Expand", "LayerNormalization"},
    "denoise": COMMON | {"Expand", "ReduceSum"},
    "fast_decode": COMMON | {"Expand", "LessOrEqual", "Range"},
}
NAMES = list(ALLOWED)


@pytest.fixture(scope="module")
def protos(bundle):
    return {name: onnx.load(bundle.graph(name), load_external_data=False) for name in NAMES}


def test_weights_at_one_place_count_once():
    def stored(offset):
        tensor = ir.ExternalTensor("w", offset, 8, ir.DataType.FLOAT, shape=ir.Shape([2]), name=f"at {offset}")
        return ir.Value(name=f"{len(values)}", type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)

    values = []
    for offset in (0, 8, 8):
        values.append(stored(offset))
    model = ir.Model(ir.Graph([], [], nodes=[], initializers=values), ir_version=10)
    assert exporter._weight_bytes(model) == 16


def weights(proto):
    return {tensor.name for tensor in proto.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL}


@pytest.mark.parametrize("name", NAMES)
def test_only_plain_operators(protos, name):
    assert {node.op_type for node in protos[name].graph.node} <= ALLOWED[name]
    assert {opset.domain for opset in protos[name].opset_import} == {""}
    assert protos[name].opset_import[0].version == 20
    assert protos[name].ir_version == 9  # the oldest that opset 20 allows
    assert not protos[name].functions


@pytest.mark.parametrize("name", NAMES)
def test_checker_and_signature(bundle, protos, name):
    check(bundle.graph(name))
    spec = next(spec for spec in graphs.specs(bundle.manifest.config, fast=True) if spec.name == name)
    sizes = graphs.sizes(bundle.manifest.config, len(bundle.manifest.vocabulary.ids))
    kinds = {"uint8": onnx.TensorProto.UINT8, "bool": onnx.TensorProto.BOOL, "int32": onnx.TensorProto.INT32,
             "float32": onnx.TensorProto.FLOAT}  # fmt: skip
    for found, wanted in ((protos[name].graph.input, spec.inputs), (protos[name].graph.output, spec.outputs)):
        assert [value.name for value in found] == [tensor.name for tensor in wanted]
        for value, tensor in zip(found, wanted, strict=True):
            dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            assert dims == list(tensor.resolve(sizes))
            assert value.type.tensor_type.elem_type == kinds[tensor.dtype]
    signature = bundle.manifest.graphs[name]
    assert [t["name"] for t in signature["inputs"]] == [tensor.name for tensor in spec.inputs]


def test_prefix_has_no_dead_tail(protos):
    """The last layer gives K and V, nothing else; nothing follows it."""
    found = weights(protos["prefix"])
    last = {name for name in found if name.startswith("backbone.layers.1.")}
    assert last == {f"backbone.layers.1.{part}.weight" for part in
                    ("input_layernorm", "self_attn.k_proj", "self_attn.v_proj")}  # fmt: skip
    assert "backbone.norm.weight" not in found
    assert not any(name.startswith(("expert.", "time_", "action_")) for name in found)


def test_denoise_has_the_expert_without_time(protos):
    found = weights(protos["denoise"])
    assert all(name.startswith(("expert.layers.", "action_in_proj.", "action_out_proj.")) for name in found)
    assert not any("norm" in name or "time" in name for name in found)  # modulations come in as a tensor
    assert len(found) == 2 * 7 + 4


def test_fast_decode_has_the_backbone_and_a_slice_of_its_embedding(bundle, protos):
    found = weights(protos["fast_decode"])
    assert {name for name in found if not name.startswith("backbone.")} == {f"unembedding.{i}" for i in range(3)}
    places = {t.name: {e.key: e.value for e in t.external_data} for t in protos["fast_decode"].graph.initializer}
    table, rows = places["backbone.embed_tokens.weight"], places["unembedding.0"]
    vocabulary, row = bundle.manifest.vocabulary, 4 * bundle.manifest.config.backbone.width
    assert int(rows["offset"]) == int(table["offset"]) + vocabulary.first * row
    assert int(rows["length"]) == vocabulary.count * row
    assert vocabulary.first + vocabulary.count - 1 == OFFSET
    assert vocabulary.extra[1] == 1


@pytest.mark.parametrize("name", NAMES)
def test_no_weight_is_stored_in_a_graph(bundle, protos, name):
    inline = [t for t in protos[name].graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    assert max(len(t.raw_data) for t in inline) <= 64
    assert bundle.graph(name).stat().st_size < 100_000
    assert {e.value for t in protos[name].graph.initializer for e in t.external_data if e.key == "location"} == {
        "weights.safetensors"
    }


@pytest.mark.parametrize("name", NAMES)
def test_linear_layers_use_the_stored_layout(protos, name):
    """Every Gemm has transB, and no MatMul or Transpose touches a weight: an engine would keep a second copy."""
    stored = weights(protos[name])
    for node in protos[name].graph.node:
        if node.op_type == "Gemm":
            assert {a.name: a.i for a in node.attribute}["transB"] == 1
            assert node.input[1] in stored
        if node.op_type in ("MatMul", "Transpose"):
            assert not stored & set(node.input)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_go_into_a_cast_and_nowhere_else(protos, name):
    """TensorRT accepts uint8 only as a network input that is cast at once."""
    types = {value.name: value.type.tensor_type.elem_type for value in protos[name].graph.input}
    raw = {tensor for tensor, kind in types.items() if kind == onnx.TensorProto.UINT8}
    users = {node.op_type for node in protos[name].graph.node if raw & set(node.input)}
    assert users == ({"Cast"} if name == "prefix" else set())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_exporting_machine_is_in_a_graph(bundle, protos, name):
    proto = protos[name]
    assert not proto.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)
    assert str(bundle.path.parent).encode() not in bundle.graph(name).read_bytes()


def test_layers_are_named_in_the_graph(bundle):
    model = ir.load(bundle.graph("denoise"))
    outputs = {value.name for node in model.graph for value in node.outputs}
    assert {"expert.layers.1.mlp.down_proj", "expert.layers.0.self_attn.q_proj", "action_in_proj"} <= outputs


def test_manifest_tells_the_runtime_where_the_time_weights_are(bundle):
    runtime, stored = bundle.manifest.weights["runtime"], bundle.weights()
    assert sorted(runtime) == sorted(flow.modulation_weights(CONFIG))
    assert all(name in stored for name in runtime.values())
    assert bundle.manifest.sampling == {"time_convention": "openpi", "num_steps": 4}


def test_a_graph_of_another_policy_is_refused(bundle, tmp_path):
    copy = Bundle.open(shutil.copytree(bundle.path, tmp_path / "bundle"))
    path, open_graph = copy.graph("denoise"), partial(open_session, backend=choose_backend("ort"))
    model = onnx.load(path, load_external_data=False)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 99
    del model.graph.value_info[:]
    path.write_bytes(model.SerializeToString())
    copy = BundleWriter(copy.path).seal(copy.manifest)
    with pytest.raises((BundleError, BackendError), match="denoise"):
        open_graph(copy, graphs.DENOISE, options=SessionOptions())
    path.write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"denoise\.onnx is not a readable ONNX graph"):
        open_graph(copy, graphs.DENOISE, options=SessionOptions())
