"""Exports in eight and four bits for engines: what a bundle says of itself, who runs it, what becomes of it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ki_export.precision.low_models
from ki_edge.bundle import Bundle
from ki_edge.checkpoints import Checkpoint
from ki_edge.errors import ArgumentError, BackendError, BundleError, ExportError
from ki_export.cli import main
from ki_export.exporter import export
from ki_export.options import ExportOptions
from ki_export.passes.low_plan import LowPlan, LowProduct
from ki_export.passes.products import EMBEDDING, matrix_products
from ki_export.triton.repository import write_repository
from ki_export.weights.differences import differing_weights
from ki_runtime.backends.registry import choose_backend
from ki_runtime.gpu.device import Device
from ki_runtime.trt.api import Api
from ki_runtime.trt.build import BuildOptions, build_bundle
from ki_runtime.trt.compiling import Settings, compile_graph
from ki_runtime.trt.profiles import profiles

KINDS = {"int8": "int8_static", "fp8": "float8", "nvfp4": "nvfp4"}  # and what the manifest calls them
TARGETS = {"int8": "8.6", "fp8": "8.9,12.0", "nvfp4": "12.0"}
TOO_OLD = {"fp8": ("8.6", "--precision int8"), "nvfp4": ("8.9", "--precision fp8")}
LAYER = "paligemma_with_expert.paligemma.model.language_model.layers.0."


def constant_plan(checkpoint, models, vocabulary, request, say):
    """Every product low with made-up scales, balanced at one place: the graphs do not depend on the numbers."""
    products, widths = {}, {}
    for name in ("prefix", "denoise"):
        for site in matrix_products(models[name].graph):
            if site.name == EMBEDDING or (site.weight is None and request.precision == "int8"):
                continue
            low = site.weight is not None
            products[site.name] = LowProduct(request.precision, 0.03) if low else LowProduct("fp8", 0.03, 0.03)
            widths[site.name] = site.weight.shape[1] if low else 0
    up = "backbone.layers.0.mlp.up_proj"
    products[up] = LowProduct(request.precision, 0.03, balance="up")
    balances = {"up": np.exp2(np.arange(widths[up]) % 2).astype(np.float32)}
    plan = LowPlan(request.precision, products, balances, "fp16")
    return SimpleNamespace(plan=plan, findings=SimpleNamespace(to_json=dict))


@pytest.fixture(scope="module")
def exported(data, tmp_path_factory):
    """exported(kind) -> the bundle, exported once. Do not change it."""
    done = {}

    def export_once(kind):
        if kind not in done:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ki_export.precision.low_models, "plan_low_bits", constant_plan)
                options = ExportOptions(target="trt-rtx", precision=kind, model_only=True, verify=False)
                done[kind] = export(data / "openpi_a", tmp_path_factory.mktemp(kind) / "bundle", options)
        return done[kind]

    return export_once


@pytest.mark.parametrize("kind", KINDS)
def test_the_bundle_says_what_it_is(kind, exported):
    bundle = exported(kind)
    manifest = bundle.manifest
    assert manifest.precision == manifest.weights["types"] == KINDS[kind]
    sites = manifest.weights["kinds"]
    assert "backbone.layers.0.mlp.up_proj" in sites[kind] and set(sites) <= {kind, "fp8"}
    assert [manifest.graphs[name]["opset"] for name in ("prefix", "denoise", "fast_decode")] == (
        [23, 23, 20] if kind == "nvfp4" else [20, 20, 20]
    )
    assert ("trt.TRT_FP4DynamicQuantize" in manifest.graphs["denoise"]["ops"]) is (kind == "nvfp4")
    plan = json.loads((bundle.path / "ranges.json").read_text())["low_bits"]
    assert plan["precision"] == kind and plan["base"] == "fp16"


@pytest.mark.parametrize("kind", KINDS)
def test_low_weights_are_stored_low_and_those_of_fast_in_sixteen_bits(kind, exported):
    entries = exported(kind).weights().entries
    key = LAYER + "mlp.up_proj.weight"
    rows, columns = entries[key].shape  # fast_decode's own
    values, scales = entries[key + ".values"], entries[key + ".scales"]
    assert entries[key].dtype == "F16" and values.dtype == {"int8": "I8", "fp8": "F8_E4M3", "nvfp4": "U8"}[kind]
    bits = 8 * (values.nbytes + (scales.nbytes if kind == "nvfp4" else 0)) / (rows * columns)
    assert bits == (4.5 if kind == "nvfp4" else 8.0)
    assert not any("vision_tower" in name and name.endswith("fc1.weight") for name in entries)  # FAST has no use for it


@pytest.mark.parametrize("kind", KINDS)
def test_other_programs_read_the_file(kind, exported):
    """safetensors' own reader, and its types."""
    from safetensors import safe_open

    path = exported(kind).weights().path
    with safe_open(path, "pt") as file:
        found = file.get_tensor(LAYER + "mlp.up_proj.weight.values")
    assert found.dtype == {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "nvfp4": torch.uint8}[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["values", "scales", "second"])
def test_a_damaged_weight_is_noticed(kind, part, exported, data, tmp_path):
    bundle, checkpoint = exported(kind), Checkpoint.open(data / "openpi_a")
    if part == "values":
        assert differing_weights(bundle, checkpoint) == []
    elif part == "second" and kind != "nvfp4":
        return
    key = LAYER + "mlp.up_proj.weight"
    entry = bundle.weights().entries[f"{key}.{part}"]
    path, content = bundle.weights().path, bundle.weights().path.read_bytes()
    try:
        with path.open("r+b") as file:
            file.seek(entry.offset)
            file.write(bytes([content[entry.offset] ^ 1]))
        assert differing_weights(Bundle.open(bundle.path), checkpoint) == [key]
    finally:
        path.write_bytes(content)


def test_a_plan_that_is_damaged_is_one_line(exported, data, monkeypatch):
    bundle = exported("int8")
    monkeypatch.setattr("ki_export.weights.low_differences.read_object", lambda *_: {"low_bits": {"balances": 3}})
    with pytest.raises(BundleError, match="'low_bits' is not a plan of low products"):
        differing_weights(bundle, Checkpoint.open(data / "openpi_a"))


@pytest.mark.parametrize("kind", KINDS)
def test_all_graphs_compile_for_the_gpus_that_have_the_type(kind, exported):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed (x86 Linux only)")
    bundle, said = exported(kind), []
    options = BuildOptions(graphs=tuple(bundle.manifest.graphs))
    engines = build_bundle(bundle.path, "trt-rtx", TARGETS[kind], options, said.append)
    assert set(engines.of) == {"prefix", "denoise", "fast_decode"}
    assert all(engines.path(graph).stat().st_size > 1e6 for graph in engines.of)
    assert any(line.startswith("compiled denoise: ") and " MB of weights (" in line for line in said)
    assert engines.of["prefix"].identity.precision == KINDS[kind]


@pytest.mark.parametrize("kind", TOO_OLD)
def test_older_gpus_are_refused_with_what_fits_them(kind, exported):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed (x86 Linux only)")
    capability, cure = TOO_OLD[kind]
    with pytest.raises(BackendError, match=f"{KINDS[kind]} needs compute capability .* not {capability}: .*{cure}"):
        build_bundle(exported(kind).path, "trt-rtx", f"{capability},12.0")


@pytest.mark.parametrize("kind", TOO_OLD)
def test_the_compiler_refuses_them_too(kind, exported, tmp_path):
    """So the table of capabilities is no opinion: these types are in the graph, and TensorRT has no kernel there."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed (x86 Linux only)")
    bundle, capability = exported(kind), tuple(map(int, TOO_OLD[kind][0].split(".")))
    settings = Settings(1 << 30, (capability,), False, None)
    files = bundle.graph("denoise"), profiles(bundle)["denoise"], tmp_path / "engine", tmp_path / "log"
    with pytest.raises(BackendError, match="HW-specific datatypes"):
        compile_graph(Api.load("tensorrt_rtx"), *files, settings)


@pytest.mark.parametrize("kind", KINDS)
def test_onnxruntime_is_no_engine_for_it(kind, exported, tmp_path):
    bundle = exported(kind)
    with pytest.raises(BackendError, match=f"precision {KINDS[kind]} is for TensorRT's engines"):
        choose_backend("ort", bundle)
    with pytest.raises(ExportError, match="is for TensorRT's engines"):
        write_repository_of(bundle, tmp_path)


def write_repository_of(bundle, folder):
    """Of a bundle without a policy, which is refused for its precision first."""
    with pytest.MonkeyPatch.context() as patch:
        assets = SimpleNamespace(contract=None)
        patch.setattr("ki_export.triton.repository.read_assets", lambda _: assets)
        return write_repository(bundle.path, folder / "models", "ort")


def test_a_jetson_orin_is_told_what_it_can(exported):
    from ki_runtime.gpu.device import check_precision

    orin = Device("Orin", (8, 7), 16 << 30, shared=True)
    check_precision(exported("int8").manifest.precision, [orin.capability])
    with pytest.raises(BackendError, match=r"float8 needs compute capability 8\.9 or newer, not 8\.7"):
        check_precision(exported("fp8").manifest.precision, [orin.capability])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "fp8"], "precision fp8 is for engines: give --target trt or trt-rtx"),
        (["--precision", "nvfp4", "--target", "ort"], "precision nvfp4 is for engines"),
        (["--target", "trt", "--keep", "vision.*"], "--keep and --budget-cosine are for precision int8, fp8 and nvfp4"),
        (["--precision", "int8", "--budget-cosine", "0.99"], "not for int8 of ort"),
        (
            ["--target", "trt", "--precision", "fp8", "--budget-cosine", "1.5"],
            "--budget-cosine 1.5: expected a cosine between",
        ),
        (["--target", "trt", "--precision", "fp8", "--stored-types"], "precision fp8 stores its own: leave one out"),
        (["--target", "trt", "--precision", "int8", "--link"], "precision int8 writes another: leave one out"),
        (["--target", "trt", "--precision", "fp8", "--attention", "fused"], "attention fused is for"),
        (
            ["--target", "trt", "--precision", "int8", "--keep", "nothing.*"],
            "--keep 'nothing.*' fits no matrix product",
        ),
    ],
)
def test_wrong_requests_are_one_line(data, tmp_path, capsys, arguments, message):
    assert main([str(data / "openpi_a"), "-o", str(tmp_path / "b"), "--model-only", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("ki-export: error: ") and message in error
    assert list(tmp_path.iterdir()) == []


def test_low_precisions_of_targets():
    assert ExportOptions(target="trt", precision="int8").low == "int8" and ExportOptions(precision="int8").low is None
    assert ExportOptions(target="trt-rtx", precision="nvfp4").base == "fp16"
    with pytest.raises(ArgumentError):
        ExportOptions(precision="fp8")
