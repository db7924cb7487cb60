"""ki-export --triton: the repository by the schema of Triton's own protobuf, against the graphs as ONNX reads them."""

import json
import shutil

import onnx
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from ki_edge.bundle import Bundle
from ki_edge.errors import ArgumentError, BackendError, BundleError, ExportError
from ki_edge.policy.contract import Camera, PolicyContract
from ki_edge.policy.presets import PRESETS
from ki_export.cli import main
from ki_export.triton import write_repository
from ki_export.triton.configuration import ModelConfig, Tensor, quoted
from ki_export.triton.tensors import policy_tensors

from ..runtime.published import ADA, ORIN, api, publish

ONNX_TYPES = {
    onnx.TensorProto.BOOL: "TYPE_BOOL",
    onnx.TensorProto.UINT8: "TYPE_UINT8",
    onnx.TensorProto.INT32: "TYPE_INT32",
    onnx.TensorProto.FLOAT: "TYPE_FP32",
}


@pytest.fixture(scope="session")
def parse(data):
    """parse(text) -> inference.ModelConfig, by the description of that message in tritonclient 2.73.0."""
    file = descriptor_pb2.FileDescriptorProto.FromString((data / "triton" / "model_config.binpb").read_bytes())
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    made = message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))
    return lambda text: text_format.Parse(text, made())


def types(tensors):
    """[(name, type, dims)] as a configuration has them; a scalar is one number that is reshaped."""
    out = []
    for tensor in tensors:
        scalar = tensor.HasField("reshape")
        assert not scalar or (list(tensor.dims), list(tensor.reshape.shape)) == ([1], [])
        kind = tensor.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[tensor.data_type].name
        out.append((tensor.name, kind, [] if scalar else list(tensor.dims)))
    return out


def onnx_types(values):
    """The same of what a graph itself says."""
    out = []
    for value in values:
        kind = value.type.tensor_type
        dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim]
        out.append((value.name, ONNX_TYPES[kind.elem_type], dims))
    return out


@pytest.fixture(scope="module")
def repository(fetch_bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton") / "models"
    assert main(["--triton", str(folder), str(fetch_bundle)]) == 0
    return folder


def test_every_model_is_what_triton_reads(repository, parse, fetch_bundle):
    assert sorted(path.name for path in repository.iterdir()) == [
        "ki_denoise",
        "ki_fast_decode",
        "ki_policy",
        "ki_prefix",
    ]
    for folder in repository.iterdir():
        config = parse((folder / "config.pbtxt").read_text("ascii"))
        assert config.name == folder.name
        assert [path.name for path in folder.iterdir() if path.is_dir()] == ["1"]
        kinds = config.instance_group[0].DESCRIPTOR.enum_types_by_name["Kind"].values_by_number
        assert [(group.count, kinds[group.kind].name) for group in config.instance_group] == [(1, "KIND_AUTO")]
        if folder.name == "ki_policy":
            continue
        assert (config.backend, config.max_batch_size) == ("onnxruntime", 0)
        graph = onnx.load(folder / "1" / config.default_model_filename)  # with its weights, which lie beside it
        assert types(config.input) == onnx_types(graph.graph.input)
        assert types(config.output) == onnx_types(graph.graph.output)


def test_the_graphs_run_where_they_lie(repository):
    ort = pytest.importorskip("onnxruntime")
    for name in ("prefix", "denoise", "fast_decode"):
        ort.InferenceSession(repository / f"ki_{name}" / "1" / f"{name}.onnx", providers=["CPUExecutionProvider"])


def test_the_repository_has_files_of_its_own(repository, fetch_bundle):
    """Each with one name: ONNX and engines refuse weights that are links."""
    files = [path for path in repository.rglob("*") if path.is_file()]
    assert {(path.is_symlink(), path.stat().st_nlink) for path in files} == {(False, 1)}
    digest = Bundle.open(fetch_bundle).digest
    assert Bundle.open(repository / "ki_policy" / "1" / "bundle", verify=True).digest == digest


def test_the_policy_takes_what_its_contract_says(repository, parse):
    config = parse((repository / "ki_policy" / "config.pbtxt").read_text("ascii"))
    assert (config.backend, config.max_batch_size, config.HasField("dynamic_batching")) == ("python", 8, True)
    assert types(config.input) == [
        ("images/front_left", "TYPE_UINT8", [-1, -1, 3]),
        ("images/front_right", "TYPE_UINT8", [-1, -1, 3]),
        ("state", "TYPE_FP32", [5]),
        ("prompt", "TYPE_STRING", [1]),
        ("noise", "TYPE_FP32", [8, 8]),
        ("seed", "TYPE_INT64", [1]),
        ("num_steps", "TYPE_INT32", [1]),
    ]
    assert [tensor.name for tensor in config.input if tensor.optional] == ["prompt", "noise", "seed", "num_steps"]
    assert types(config.output) == [("actions", "TYPE_FP64", [8, 4])]
    contract = PolicyContract.from_json(json.loads(config.parameters["contract"].string_value))
    assert contract.control_hz == 25.0 and contract.action_names == ("x", "y", "z", "gripper")


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("pi05_droid", ["observation/exterior_image_1_left", "observation/wrist_image_left",
                        "observation/joint_position", "observation/gripper_position", "prompt"]),
        ("pi05_libero", ["observation/image", "observation/wrist_image", "observation/state", "prompt"]),
        ("pi05_aloha", ["images/cam_high", "images/cam_left_wrist", "images/cam_right_wrist", "state", "prompt"]),
    ],
)  # fmt: skip
def test_inputs_are_the_keys_of_the_robots_observations(name, keys):
    inputs, _ = policy_tensors(PRESETS[name].contract())
    assert [tensor.name for tensor in inputs if tensor.name not in ("noise", "seed", "num_steps")] == keys


def test_texts_of_any_kind_come_back(parse):
    odd = 'a "quoted" \\ back\nslash, π, \x00\x7f and \U0001f916 {'
    config = ModelConfig(odd, "python", "KIND_CPU", [Tensor(odd, "text", (1,))], [], parameters={odd: odd})
    read = parse(config.text())
    assert (read.name, read.input[0].name, dict(read.parameters)[odd].string_value) == (odd, odd, odd)
    assert quoted("π") == '"\\317\\200"'


def test_precision_says_where_a_model_runs(fetch_bundle, tmp_path, parse):
    for precision, kind in {"int8": 2, "float16": 1, "bfloat16": 1}.items():
        bundle = shutil.copytree(fetch_bundle, tmp_path / precision)
        manifest = json.loads((bundle / "manifest.json").read_text())
        (bundle / "manifest.json").write_text(json.dumps({**manifest, "precision": precision}))
        write_repository(bundle, tmp_path / f"{precision}-models")
        for path in (tmp_path / f"{precision}-models").glob("*/config.pbtxt"):
            config = parse(path.read_text())
            assert config.instance_group[0].kind == kind, path
            assert config.HasField("dynamic_batching") == (config.backend == "python" and precision != "int8")


def test_engines_become_plans(fetch_bundle, tmp_path, parse):
    """One file for each compute capability; the policy's own bundle brings the engines too."""
    bundle = Bundle.open(shutil.copytree(fetch_bundle, tmp_path / "bundle"))
    names = list(bundle.manifest.graphs)
    ada, orin = (publish(bundle, device=device, graphs=names) for device in (ADA, ORIN))
    publish(bundle, api("tensorrt_rtx"), device=ADA, graphs=names)
    write_repository(bundle.path, tmp_path / "models", "trt")
    for name in names:
        config = parse((tmp_path / "models" / f"ki_{name}" / "config.pbtxt").read_text())
        assert (config.backend, config.instance_group[0].kind) == ("tensorrt", 1)
        for capability, engines in (("8.9", ada), ("8.7", orin)):
            file = tmp_path / "models" / f"ki_{name}" / "1" / config.cc_model_filenames[capability]
            assert file.read_bytes() == engines.path(name).read_bytes()
        assert len(config.cc_model_filenames) == 2
    inner = tmp_path / "models" / "ki_policy" / "1" / "bundle" / "engines"
    assert (inner / ada.folder.name / "prefix.engine").is_file()


def change_graph(bundle, engines):
    content = json.loads((bundle.path / "manifest.json").read_text())
    content["files"]["weights.safetensors"]["sha256"] = "0" * 64
    (bundle.path / "manifest.json").write_text(json.dumps(content))


UNFIT = {
    "none": (None, "has no engine of prefix for Triton's TensorRT: build it on that GPU"),
    "of another export": (change_graph, "was built of another export"),
    "damaged": (lambda bundle, engines: engines.path("prefix").write_bytes(b"x" * engines.files["prefix"].size),
                "has changed since it was built"),
    "unreadable": (lambda bundle, engines: (engines.folder / "engine.json").write_text("{"), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_engines_that_do_not_fit_are_refused(name, fetch_bundle, tmp_path):
    spoil, message = UNFIT[name]
    bundle = Bundle.open(shutil.copytree(fetch_bundle, tmp_path / "bundle"))
    if spoil is not None:
        spoil(bundle, publish(bundle, device=ADA))
    with pytest.raises(BackendError, match=message):
        write_repository(bundle.path, tmp_path / "models", "trt")
    assert not (tmp_path / "models").exists() and sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def test_engines_for_the_lean_runtime_are_not_tritons(fetch_bundle, tmp_path):
    bundle = Bundle.open(shutil.copytree(fetch_bundle, tmp_path / "bundle"))
    publish(bundle, device=ADA, lean=True)
    with pytest.raises(BackendError, match="is of the lean runtime"):
        write_repository(bundle.path, tmp_path / "models", "trt")


def refusals(fetch_bundle, checkpoint, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    new = tmp_path / "new"
    return {
        "is a checkpoint, not a bundle": [checkpoint, "--triton", new],
        "no bundle at": [tmp_path / "nothing", "--triton", new],
        "exists: name a folder that does not": [fetch_bundle, "--triton", there],
        "takes no -o, --precision": [fetch_bundle, "--triton", new, "-o", tmp_path / "out", "--precision", "int8"],
        "no backend for the target 'trt-rtx'": [fetch_bundle, "--triton", new, "--target", "trt-rtx"],
        "could not be written: File exists": [fetch_bundle, "--triton", fetch_bundle / "manifest.json" / "new"],
    }


def test_what_cannot_be_done_is_one_line(fetch_bundle, fetch_checkpoint, tmp_path, capsys):
    for message, arguments in refusals(fetch_bundle, fetch_checkpoint, tmp_path).items():
        assert main([*map(str, arguments)]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and message in lines[0], lines
        assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_a_bundle_of_the_model_alone_is_refused(fetch_bundle, tmp_path):
    bundle = shutil.copytree(fetch_bundle, tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "contract": None}))
    with pytest.raises(BundleError, match="holds a model, not a policy: it has no contract"):
        write_repository(bundle, tmp_path / "models")
    with pytest.raises(ArgumentError, match="no backend for the target 'cuda'"):
        write_repository(fetch_bundle, tmp_path / "models", "cuda")


def test_a_full_disk_leaves_nothing(fetch_bundle, tmp_path, largest_file):
    with largest_file(100_000), pytest.raises(ExportError, match="could not be written"):
        write_repository(fetch_bundle, tmp_path / "models")
    assert list(tmp_path.iterdir()) == []


def test_cameras_that_may_be_absent_are_optional():
    cameras = (Camera("base_0_rgb", "cam_high"), Camera("left_wrist_0_rgb", "cam_left_wrist", required=False))
    inputs, _ = policy_tensors(PRESETS["pi05_aloha"].contract(cameras=cameras))
    assert [(tensor.name, tensor.optional) for tensor in inputs[:2]] == [
        ("images/cam_high", False),
        ("images/cam_left_wrist", True),
    ]
