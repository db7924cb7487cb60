"""The proof: what it compares, what it reports, and that it finds damage and names it."""

import json
import shutil
from functools import partial

import numpy as np
import onnx
import pytest

from ki_edge.bundle import Bundle, BundleWriter
from ki_edge.model import Checkpoint
from ki_edge.model.streaming import streamed
from ki_edge.safetensors_index import SafetensorsIndex
from ki_export import cli, exporter, localize, parity_cli, segments, sides
from ki_export.bars import FLOAT32, measure
from ki_export.cases import standard_cases
from ki_export.changed import changed_weights
from ki_export.parity import compare_with_checkpoint
from ki_export.segments import SegmentPool, cut

from .conftest import CONFIG, OPENPI_KEYS

BACKBONE, EXPERT = OPENPI_KEYS.backbone, OPENPI_KEYS.expert
VISION = "paligemma_with_expert.paligemma.model.vision_tower.vision_model."
DAMAGE = [  # weight, graph and tensor that fail first, first wrong layer
    (f"{VISION}encoder.layers.0.mlp.fc1.weight", "prefix: prefix_", "vision.encoder.layers.0.mlp.fc1"),
    (f"{BACKBONE}layers.0.mlp.up_proj.weight", "layer 1", "backbone.layers.0.mlp.up_proj"),
    (f"{BACKBONE}layers.1.self_attn.k_proj.weight", "prefix: prefix_k layer 1", "backbone.layers.1.self_attn.k_proj"),
    (f"{BACKBONE}layers.1.mlp.down_proj.weight", "fast_decode: logits", "backbone.layers.1.mlp.down_proj"),
    (f"{EXPERT}layers.1.self_attn.v_proj.weight", "denoise: x_next step", "expert.layers.1.self_attn.v_proj"),
    ("action_out_proj.bias", "denoise: x_next step", "action_out_proj"),
    ("time_mlp_in.weight", "runtime: modulation step", None),
]


def damage(file, name):
    """Change one tensor of a safetensors file in place."""
    index = SafetensorsIndex(file)
    changed = -index.array(name) + np.float32(0.01)
    with file.open("r+b") as out:
        out.seek(index.entries[name].offset)
        out.write(changed.tobytes())


@pytest.fixture
def packed(bundle, tmp_path):
    """A copy of the bundle with weights of its own."""
    return Bundle.open(shutil.copytree(bundle.path, tmp_path / "packed"))


@pytest.fixture
def small_segments(monkeypatch):
    """Nothing stays in memory: a segment a layer, and no session or weight kept."""
    each_layer = partial(cut, limit=0)
    monkeypatch.setattr(segments, "cut", each_layer)
    monkeypatch.setattr(localize, "cut", each_layer)
    monkeypatch.setattr(sides, "SegmentPool", partial(SegmentPool, budget=0))
    monkeypatch.setattr(sides, "streamed", partial(streamed, budget=0))


@pytest.mark.parametrize("method", ["resident", "streamed"])
@pytest.mark.parametrize(("key", "where", "layer"), DAMAGE)
def test_a_damaged_weight_is_found_and_named(checkpoint, packed, key, where, layer, method, small_segments):
    damage(packed.path / "weights.safetensors", key)
    comparison = compare_with_checkpoint(packed, Checkpoint.open(checkpoint), lambda line: None, method=method)
    assert where in comparison.explanation
    assert f"weight '{key}' in the bundle is not the checkpoint's" in comparison.explanation
    if layer:
        assert f"first wrong layer {layer};" in comparison.explanation
    assert "\n" not in comparison.explanation


def test_a_damaged_export_is_not_published(checkpoint, tmp_path, monkeypatch, capsys):
    place = exporter.place_weights

    def placed_badly(*args, **options):
        weights = place(*args, **{**options, "pack": True})
        damage(weights.index.path, f"{EXPERT}layers.0.mlp.gate_proj.weight")
        return weights

    monkeypatch.setattr(exporter, "place_weights", placed_badly)
    status = cli.main([str(checkpoint), "-o", str(tmp_path / "bundle")])
    assert status == 1
    assert list(tmp_path.iterdir()) == []
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("ki-export: error: denoise: x_next step")
    assert "first wrong layer expert.layers.0.mlp.gate_proj" in last


def test_a_wrong_graph_with_right_weights_is_blamed_on_the_graph(checkpoint, packed):
    """A graph whose rotary frequencies are one percent off."""
    path = packed.graph("prefix")
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and list(tensor.dims) == [CONFIG.backbone.head_dim // 2]:
            values = onnx.numpy_helper.to_array(tensor) * np.float32(1.01)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    path.write_bytes(proto.SerializeToString())
    packed = BundleWriter(packed.path).seal(packed.manifest)
    comparison = compare_with_checkpoint(packed, Checkpoint.open(checkpoint), lambda line: None)
    assert comparison.explanation.startswith("prefix: prefix_k layer 0")
    assert "its weights are the checkpoint's" in comparison.explanation


def test_changed_weights_of_an_untouched_bundle(checkpoint, bundle):
    assert changed_weights(bundle, Checkpoint.open(checkpoint)) == []


def test_report_of_an_export(bundle):
    report = json.loads((bundle.path / "parity.json").read_text())
    assert report["verified"] is True and bundle.manifest.parity["verified"] is True
    assert bundle.manifest.parity["worst"] == report["worst"]
    compared = {(m["graph"], m["tensor"]) for m in report["measurements"]}
    assert compared == {
        ("prefix", "prefix_mask"), ("prefix", "prefix_k"), ("prefix", "prefix_v"), ("denoise", "x_next"),
        ("fast_decode", "logits"), ("fast_decode", "new_k"), ("fast_decode", "new_v"), ("runtime", "modulation"),
        ("runtime", "prefix_mask"), ("runtime", "prefix_k"), ("runtime", "prefix_v"), ("runtime", "x"),
        ("runtime", "actions"), ("runtime", "greedy_ids"),
    }  # fmt: skip
    assert all(m["passed"] and m["error"] <= m["limit"] for m in report["measurements"])
    assert {case["batch"] for case in report["cases"]} == {1, 2}
    page = (bundle.path / "parity.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "all bars held" in page and "http" not in page


def test_cases_cover_absent_cameras_short_and_full_prompts_and_batches():
    cases = standard_cases(CONFIG, cameras=1, max_prompt=20, num_steps=4, forced=(3,))
    assert all(case.camera_mask.shape[1] == 2 for case in cases)
    assert any(not case.camera_mask.all() for case in cases)
    assert {int(n) for case in cases for n in case.prompt_mask.sum(axis=1)} == {1, 9, 20}
    assert len({case.noise.tobytes() for case in cases}) == len(cases)


@pytest.mark.parametrize("given", [[np.nan, 0.0], [np.inf, 0.0], [0.0], [[0.0, 0.0]]])
def test_nan_infinity_and_shape_fail(given):
    found = measure("case", "denoise", "x_next", given, [0.0, 0.0])
    assert not found.passed and found.severity == np.inf


def test_scaled_bars_grow_with_the_reference_only_above_one():
    assert measure("c", "prefix", "prefix_k", [0.1], [0.1]).limit == FLOAT32["prefix_k"].limit
    assert measure("c", "prefix", "prefix_k", [8.0], [8.0]).limit == 8 * FLOAT32["prefix_k"].limit
    assert measure("c", "runtime", "actions", [8.0], [8.0]).limit == 2e-5


def test_ki_parity_against_a_checkpoint(checkpoint, bundle, tmp_path, capsys):
    status = parity_cli.main([str(bundle.path), "--checkpoint", str(checkpoint), "--report", str(tmp_path / "report")])
    assert status == 0
    assert "FAILED" not in capsys.readouterr().out
    assert (tmp_path / "report" / "parity.html").is_file()


def test_ki_parity_of_a_damaged_bundle_writes_the_report(checkpoint, packed, tmp_path, capsys):
    damage(packed.path / "weights.safetensors", "action_in_proj.weight")
    status = parity_cli.main([str(packed.path), "--checkpoint", str(checkpoint), "--report", str(tmp_path / "report")])
    assert status == 1
    output = capsys.readouterr()
    assert "FAILED" in output.out and "action_in_proj" in output.err.splitlines()[-1]
    assert "bars failed" in (tmp_path / "report" / "parity.html").read_text()


def test_recordings_that_cannot_be_compared(bundle, tmp_path, capsys):
    def run(*arguments):
        status = parity_cli.main([str(bundle.path), *map(str, arguments)])
        return status, capsys.readouterr().err

    outputs = tmp_path / "outputs.npz"
    assert run("--outputs", outputs)[0] == 2
    outputs.write_bytes(b"PK no archive")
    assert "no .npz file" in run("--outputs", outputs)[1]
    np.savez(outputs, loss=np.zeros(3))
    assert "none of actions" in run("--outputs", outputs)[1]
    np.savez(outputs, actions=np.zeros((1, 5, 6), np.float32))
    assert "inputs.npz" in run("--outputs", outputs)[1]
    np.savez(tmp_path / "inputs.npz", noise=np.zeros(3))
    status, error = run("--outputs", outputs)
    assert status == 2 and "image/<camera>" in error and len(error.splitlines()) == 1
    status, error = run("--checkpoint", tmp_path, "--inputs", outputs)
    assert status == 2 and "--inputs" in error
