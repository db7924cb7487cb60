"""What TensorRT asks of a graph, a GPU and the memory before anything is compiled, and how it is told."""

from dataclasses import replace
from types import SimpleNamespace

import onnx
import pytest
from onnx import TensorProto, helper

from ki_edge.errors import ArgumentError, BackendError, BundleError
from ki_runtime.gpu.device import Device, check_precision, parse_capabilities
from ki_runtime.trt import compiling, memory
from ki_runtime.trt.api import Api
from ki_runtime.trt.requirements import GraphFacts, check_graph, graph_facts

AMPERE, ADA = Device("NVIDIA GeForce RTX 3090", (8, 6), 24 << 30), Device("NVIDIA L4", (8, 9), 24 << 30)


@pytest.fixture(scope="session")
def rtx():
    return Api.load("tensorrt_rtx")


def save_graph(path, node, opset=20, **types):
    """An ONNX file of one node over x, y -> z, all [2, 2]."""
    tensors = [helper.make_tensor_value_info(n, types.get(n, TensorProto.FLOAT), [2, 2]) for n in (*node.input, "z")]
    graph = helper.make_graph([node], "g", tensors[:-1], tensors[-1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9), path)
    return path


class TestGraphs:
    def test_a_node_that_cannot_be_imported_is_named_in_one_line(self, rtx, tmp_path) -> None:
        node = helper.make_node("MatMulInteger", ["x", "y"], ["z"], name="layer_3/product")
        types = {"x": TensorProto.INT8, "y": TensorProto.INT8, "z": TensorProto.INT32}
        path = save_graph(tmp_path / "strange.onnx", node, **types)
        settings = compiling.Settings(1 << 30, ((8, 6),))
        engine, log = tmp_path / "out.engine", tmp_path / "out.log"
        with pytest.raises(BackendError) as error:
            compiling.compile_graph(rtx, path, (), engine, log, settings)
        message = str(error.value)
        assert "cannot import graph strange: node layer_3/product (MatMulInteger): " in message and "\n" not in message
        assert "[error]" in log.read_text()

    def test_the_builders_own_reason_is_given(self, rtx, tmp_path) -> None:
        node = helper.make_node("Add", ["x", "y"], ["z"])
        types = dict.fromkeys("xyz", TensorProto.BFLOAT16)
        path = save_graph(tmp_path / "half.onnx", node, **types)
        settings = compiling.Settings(1 << 30, ((7, 5),))
        with pytest.raises(BackendError, match=r"cannot compile graph half: .*target.*sm75.*b16"):
            compiling.compile_graph(rtx, path, (), tmp_path / "out.engine", tmp_path / "out.log", settings)

    def test_the_manifest_agrees_with_the_graphs(self, bundle) -> None:
        for name in bundle.manifest.graphs:
            found, model = graph_facts(bundle, name), onnx.load(bundle.graph(name), load_external_data=False)
            assert found.operators == sorted({node.op_type for node in model.graph.node})
            assert found.opset == model.opset_import[0].version == 20
            stored = {}
            for tensor in model.graph.initializer:
                place = {entry.key: entry.value for entry in tensor.external_data}
                inline = onnx.numpy_helper.to_array(tensor).nbytes if not place else 0
                stored[place.get("offset", tensor.name)] = int(place.get("length", inline))
            assert found.weight_bytes == sum(stored.values())

    @pytest.mark.parametrize("field", ["opset", "ops", "weight_bytes"])
    def test_a_bundle_that_does_not_tell_is_exported_again(self, bundle, field: str) -> None:
        graphs = {name: dict(graph) for name, graph in bundle.manifest.graphs.items()}
        del graphs["denoise"][field]
        older = replace(bundle, manifest=replace(bundle.manifest, graphs=graphs))
        with pytest.raises(BundleError, match=f"lacks the {field} of graph denoise: export the checkpoint again"):
            graph_facts(older, "denoise")

    @pytest.mark.parametrize(
        ("version", "operator", "opset", "message"),
        [
            (
                "10.3.0",
                "Attention",
                20,
                r"Attention needs TensorRT 10\.14, installed is 10\.3\.0: .*--attention decomp",
            ),
            ("10.13.2", "Attention", 20, r"Attention needs TensorRT 10\.14, installed is 10\.13\.2"),
            ("10.14.0", "Attention", 23, None),
            ("10.3.0", "Gelu", 20, None),
            ("10.3.0", "Gelu", 23, r"opset 23 needs TensorRT 10\.11, installed is 10\.3\.0: export with --opset 20"),
            ("11.4.0", "Gelu", 99, "opset 99 needs a newer TensorRT than exists yet"),
            ("11.4.0", "MatMulInteger", 20, "no TensorRT imports MatMulInteger"),
            ("11.4.0", "com.microsoft.MatMulIntegerToFloat", 20, "no TensorRT imports com.microsoft.MatMulInteger"),
        ],
    )
    def test_what_a_graph_needs_of_tensorrt(self, version, operator, opset, message) -> None:
        api = Api(None, "tensorrt", tuple(map(int, version.split("."))), version)
        graph = GraphFacts(opset, ["Add", operator], 0)
        if message is None:
            check_graph(api, "prefix", graph)
            return
        with pytest.raises(BackendError, match=f"graph prefix: {message}"):
            check_graph(api, "prefix", graph)

    @pytest.mark.parametrize(
        ("precision", "capability", "message"),
        [
            ("float32", (7, 5), None),
            ("float16", (7, 5), None),
            ("bfloat16", (8, 0), None),
            (
                "bfloat16",
                (7, 5),
                r"bfloat16 needs compute capability 8\.0 or newer, not 7\.5: export with --precision fp16",
            ),
            ("int8", (8, 6), "precision int8 is for the CPU: export the checkpoint with --target trt"),
            ("int8_static", (7, 5), None),
            ("int8_static", (7, 0), r"int8_static needs compute capability 7\.5 .* not 7\.0: .* --precision fp16"),
            ("float8", (8, 9), None),
            ("float8", (8, 7), r"float8 needs compute capability 8\.9 or newer, not 8\.7: .* --precision int8"),
            ("nvfp4", (11, 0), None),
            ("nvfp4", (9, 0), r"nvfp4 needs compute capability 10\.0 or newer, not 9\.0: .* --precision fp8"),
            ("nvfp4", (8, 7), r"not 8\.7: export with --precision int8"),
            ("nvfp4", (7, 0), r"not 7\.0: export with --precision fp16"),
        ],
    )
    def test_precision(self, precision, capability, message) -> None:
        if message is None:
            check_precision(precision, [capability, (12, 0)])
            return
        with pytest.raises(BackendError, match=message):
            check_precision(precision, [capability, (12, 0)])


class TestEstimates:
    def test_engines_grown_to_float32_are_refused(self) -> None:
        said = []
        memory.check_size("prefix", int(1.05e9), int(1e9), "float16", said.append)
        assert said == []
        memory.check_size("prefix", int(1.5e9), int(1e9), "float16", said.append)
        memory.check_size("prefix", int(2.1e9), int(1e9), "float32", said.append)
        assert len(said) == 2 and "1.50 GB for 1.00 GB of weights" in said[0]
        with pytest.raises(BackendError, match="TensorRT widened them"):
            memory.check_size("prefix", int(2.0e9), int(1e9), "float16", said.append)

    def test_weights_beyond_the_gpu(self, rtx, monkeypatch) -> None:
        monkeypatch.setattr(memory, "with_swap", lambda meminfo: int(99e9))
        memory.check_memory(rtx, "prefix", int(9e9), replace(AMPERE, memory=int(10e9)))
        with pytest.raises(BackendError, match=r"9\.0 GB of weights and the GPU 8\.0 GB of memory"):
            memory.check_memory(rtx, "prefix", int(9e9), replace(AMPERE, memory=int(8e9)))

    def test_older_parsers_copy_the_weights(self) -> None:
        old, new = (Api(SimpleNamespace(), "tensorrt", version, "") for version in ((10, 3), (10, 13)))
        assert memory.needed(old, int(1e9)) - memory.needed(new, int(1e9)) == pytest.approx(1e9)

    def test_a_gpu_s_own_memory_is_not_the_hosts(self, monkeypatch) -> None:
        api = Api(SimpleNamespace(), "tensorrt", (10, 13), "10.13.0")
        board, known, card = (memory.needed(api, int(4e9), shared=shared) for shared in (True, None, False))
        assert board == known == pytest.approx(card + 4e9)
        monkeypatch.setattr(memory, "with_swap", lambda meminfo: card + 1)
        memory.check_memory(api, "prefix", int(4e9), replace(AMPERE, shared=False))
        with pytest.raises(BackendError, match=r"of memory, .* are free"):
            memory.check_memory(api, "prefix", int(4e9), replace(AMPERE, shared=True))


def test_capabilities_of_text() -> None:
    assert parse_capabilities("12.0, 8.6,8.6") == ((8, 6), (12, 0))
    for text in ("", "8", "86", "8.6,", "sm86", "8.65"):
        with pytest.raises(ArgumentError, match=r"expected numbers such as 8\.6"):
            parse_capabilities(text)
