"""A graph's weights lie in the bundle's weights file and nowhere else, whatever its ONNX file says."""

import os
import shutil

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from ki_edge.bundle import Bundle
from ki_edge.bundle.external_data import MOST_BYTES, check_external_data
from ki_edge.errors import BundleError
from ki_edge.files.protobuf import fields


def external(location="weights.safetensors", **more):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": "8", "length": "8", **more}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    return tensor


def initializer(tensor):
    return helper.make_model(helper.make_graph([], "g", [], [], [tensor]))


def attribute(tensor):
    return helper.make_model(helper.make_graph([helper.make_node("Constant", [], ["c"], value=tensor)], "g", [], []))


def attribute_list(tensor):
    node = helper.make_node("Custom", [], ["c"])
    node.attribute.add(name="all", type=onnx.AttributeProto.TENSORS).tensors.append(tensor)
    return helper.make_model(helper.make_graph([node], "g", [], []))


def subgraph(tensor):
    inner = helper.make_graph([], "inner", [], [], [tensor])
    node = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    return helper.make_model(helper.make_graph([node], "g", [], []))


def function(tensor):
    model = helper.make_model(helper.make_graph([], "g", [], []))
    node = helper.make_node("Constant", [], ["c"], value=tensor)
    model.functions.append(helper.make_function("d", "f", [], ["c"], [node], [helper.make_opsetid("", 20)]))
    return model


def sparse(tensor):
    model = helper.make_model(helper.make_graph([], "g", [], []))
    model.graph.sparse_initializer.add().values.CopyFrom(tensor)
    return model


def training(tensor):
    model = helper.make_model(helper.make_graph([], "g", [], []))
    model.training_info.add().algorithm.initializer.append(tensor)
    return model


PLACES = [initializer, attribute, attribute_list, subgraph, function, sparse, training]


@pytest.fixture
def check(tmp_path):
    """check(model or bytes, name="prefix.onnx"): write it beside a weights file of 100 bytes and check it."""
    (tmp_path / "weights.safetensors").write_bytes(bytes(100))

    def run(model, name="prefix.onnx"):
        content = model if isinstance(model, bytes) else model.SerializeToString()
        (tmp_path / name).write_bytes(content)
        check_external_data(tmp_path / name, tmp_path / "weights.safetensors")

    return run


@pytest.mark.parametrize("place", PLACES)
def test_wherever_a_tensor_is(check, place):
    check(place(external()))
    with pytest.raises(
        BundleError, match=r"prefix\.onnx: a tensor lies in '\.\./etc/passwd', not in the bundle's weig"
    ):
        check(place(external("../etc/passwd")))


@pytest.mark.parametrize(
    "location",
    [
        "/etc/passwd", "./weights.safetensors", "assets/../weights.safetensors", "weights.safetensors\0", "", " ", None,
        "*/_ORT_MEM_ADDR_/*", "prefix.onnx", "WEIGHTS.SAFETENSORS", "\ud800".encode("utf-8", "surrogatepass"),
    ],
)  # fmt: skip
def test_every_other_name(check, location):
    if isinstance(location, bytes):
        content = initializer(external("XXX")).SerializeToString().replace(b"XXX", location)
    else:
        content = initializer(external(location)).SerializeToString()
    with pytest.raises(BundleError, match="a tensor lies in"):
        check(content)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"offset": "97"}, "ends at byte 105 of weights.safetensors, which has 100"),
        ({"length": "93"}, "ends at byte 101"),
        ({"offset": "-8"}, "is not a number of bytes"),
        ({"offset": "9" * 20}, "is not a number of bytes"),
        ({"length": "²"}, "is not a number of bytes"),
        ({"length": ""}, "is not a number of bytes"),
    ],
)
def test_beyond_the_end(check, more, message):
    with pytest.raises(BundleError, match=message):
        check(initializer(external(**more)))


def test_a_second_location_is_not_overlooked(check):
    tensor = external()
    tensor.external_data.add(key="location", value="/etc/passwd")
    with pytest.raises(BundleError, match=r"b'location' comes twice"):
        check(initializer(tensor))


def test_a_location_alone_counts_too(check):
    """Engines disagree on whether the flag or the entries decide."""
    tensor = external("/etc/passwd")
    tensor.data_location = TensorProto.DEFAULT
    with pytest.raises(BundleError, match="a tensor lies in '/etc/passwd'"):
        check(initializer(tensor))


def nested(depth):
    """Messages within messages, each the same two fields: an attribute's graph, a graph's node, a node's attribute."""
    content = b""
    for field in [6, 5, 1] * depth + [7]:
        content = bytes([field << 3 | 2]) + varint(len(content)) + content
    return content


def varint(value):
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff" * 100, "more than 64 bits"),
        (b"\x3a\x05a", "ends too early"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7fa", "ends too early"),
        (b"\x38\x01", "field 7 is not a message"),
        (b"\x0b", "wire type 3"),
        (b"\x3a", "index out of"),
        (nested(2000), "nested more than 32 deep"),
    ],
)
def test_what_is_no_graph(check, content, message):
    with pytest.raises(BundleError, match=f"is not a readable ONNX graph .*{message}"):
        check(content)


def test_files_that_are_no_graphs(check, tmp_path):
    with pytest.raises(BundleError, match="a graph's file is named"):
        check(b"", "prefix.ort")
    with (tmp_path / "big.onnx").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(BundleError, match="has more than"):
        check_external_data(tmp_path / "big.onnx", tmp_path / "weights.safetensors")
    os.mkfifo(tmp_path / "fifo.onnx")
    with pytest.raises(BundleError, match="is not a regular file"):
        check_external_data(tmp_path / "fifo.onnx", tmp_path / "weights.safetensors")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(content):
    try:
        for _, value in fields(memoryview(content)):
            assert isinstance(value, int | memoryview)
    except (ValueError, IndexError):
        pass


def test_an_exported_bundle(fetch_bundle, tmp_path):
    """A bundle as shipped passes; one whose graph was changed to read another file is not loaded."""
    copy = shutil.copytree(fetch_bundle, tmp_path / "bundle")
    bundle = Bundle.open(copy)
    assert [bundle.graph(name).name for name in bundle.manifest.graphs] == [
        f"{name}.onnx" for name in bundle.manifest.graphs
    ]
    model = onnx.load(copy / "denoise.onnx", load_external_data=False)
    first = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in first.external_data if entry.key == "location").value = "weights.safetensor/"
    (copy / "denoise.onnx").write_bytes(model.SerializeToString())
    bundle.graph("prefix")
    with pytest.raises(BundleError, match=r"a tensor lies in 'weights.safetensor/'"):
        bundle.graph("denoise")
