"""The proof: what it compares, what it reports, and that it finds damage and names it."""

import io
import json
import shutil
import time

import numpy as np
import onnx
import pytest
from safetensors.torch import load_file, save_file

from ki_edge import progress
from ki_edge.bundle import Bundle, BundleWriter
from ki_edge.checkpoints import Checkpoint
from ki_edge.config import PI05
from ki_edge.errors import ArgumentError
from ki_edge.files.safetensors_index import SafetensorsIndex
from ki_edge.progress import Progress
from ki_export import cli, exporter
from ki_export.parity import cli as parity_cli
from ki_export.parity import localize, pair
from ki_export.parity.bars import FLOAT32, bars_of, measure
from ki_export.parity.cases import compact_cases, standard_cases
from ki_export.parity.comparison import compare
from ki_export.parity.localize import sample
from ki_export.parity.pair import choose_method, open_pair
from ki_export.parity.parity import compare_with_checkpoint
from ki_export.weights.differences import differing_weights

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
def nothing_held(monkeypatch):
    """No weight of a streamed model stays in memory."""
    monkeypatch.setattr(pair, "BUDGET", 0)


@pytest.mark.parametrize("method", ["resident", "streamed"])
@pytest.mark.parametrize(("key", "where", "layer"), DAMAGE)
def test_a_damaged_weight_is_found_and_named(checkpoint, packed, key, where, layer, method, nothing_held):
    damage(packed.path / "weights.safetensors", key)
    comparison = compare_with_checkpoint(packed, Checkpoint.open(checkpoint), lambda line: None, method=method)
    assert where in comparison.explanation
    assert f"weight '{key}' differs from the checkpoint's" in comparison.explanation
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
    assert differing_weights(bundle, Checkpoint.open(checkpoint)) == []


def test_both_methods_find_the_same(checkpoint, bundle, nothing_held):
    """On the same cases: the same comparisons with the same reference, bit for bit; errors differ by rounding."""
    opened = Checkpoint.open(checkpoint)
    cases = standard_cases(CONFIG, cameras=3, max_prompt=20, num_steps=4, forced=(3, 5))
    resident, pieces = (
        compare(with_ids(open_pair(bundle, opened, method, silent()), bundle), cases, silent())
        for method in ("resident", "streamed")
    )
    assert (resident.method, pieces.method) == ("resident", "streamed") and resident.cases == pieces.cases
    assert len(resident.measurements) == len(pieces.measurements) > 200
    for one, other in zip(resident.measurements, pieces.measurements, strict=True):
        assert (one.case, one.where, one.magnitude, one.limit) == (
            other.case,
            other.where,
            other.magnitude,
            other.limit,
        )
        assert abs(one.error - other.error) <= max(one.limit, other.limit) / 2
        assert one.passed and other.passed
    np.testing.assert_array_equal(resident.traces[1], pieces.traces[1])


def silent():
    return Progress(lambda line: None)


def with_ids(sides, bundle):
    sides.model.decode_ids = tuple(bundle.manifest.vocabulary.ids)
    return sides


@pytest.mark.parametrize("method", ["resident", "streamed"])
@pytest.mark.parametrize(
    "key", [f"{BACKBONE}layers.1.mlp.down_proj.weight", f"{BACKBONE}layers.0.mlp.down_proj.weight"]
)
def test_a_weight_that_is_not_a_number(checkpoint, packed, key, method, nothing_held):
    """Also where the runtime itself refuses the logits that come of it."""
    file = packed.path / "weights.safetensors"
    with file.open("r+b") as out:
        out.seek(SafetensorsIndex(file).entries[key].offset)
        out.write(np.float32(np.nan).tobytes())
    comparison = compare_with_checkpoint(packed, Checkpoint.open(checkpoint), lambda line: None, method=method)
    assert f"weight '{key}' differs from the checkpoint's" in comparison.explanation
    assert "first wrong layer backbone.layers" in comparison.explanation


def test_a_single_value_of_one_layer(checkpoint, packed, nothing_held):
    """Flipped bits of one weight, in one column of one layer."""
    key, file = f"{BACKBONE}layers.0.mlp.gate_proj.weight", packed.path / "weights.safetensors"
    with file.open("r+b") as out:
        out.seek(SafetensorsIndex(file).entries[key].offset + 3)
        out.write(b"\x42")
    comparison = compare_with_checkpoint(packed, Checkpoint.open(checkpoint), lambda line: None, method="streamed")
    assert comparison.explanation.startswith("prefix: prefix_k layer 1")
    assert "first wrong layer backbone.layers.0.mlp.gate_proj" in comparison.explanation
    assert f"weight '{key}'" in comparison.explanation


def test_an_export_of_a_large_model_says_that_it_was_streamed(checkpoint, tmp_path, monkeypatch, nothing_held):
    monkeypatch.setattr(pair, "RESIDENT", 1000)
    lines = []
    bundle = exporter.export(checkpoint, tmp_path / "bundle", exporter.ExportOptions(), lines.append)
    parity = bundle.manifest.parity
    assert parity["verified"] is True and parity["method"] == "streamed"
    assert [case["name"] for case in parity["cases"]] == ["seed 0: absent camera, short prompt"]
    report = json.loads((bundle.path / "parity.json").read_text())
    assert {m["graph"] for m in report["measurements"]} == {"prefix", "denoise", "fast_decode", "runtime"}
    assert any(
        line.startswith("proven equal to the PyTorch model of checkpoint (") and "peak memory" in line for line in lines
    )


@pytest.mark.parametrize("options", [{"precision": "int8"}, {"weights": "stored"}])
def test_a_damaged_weight_of_another_form_is_found_and_named(copied, tmp_path, options, nothing_held):
    """Quantised weights, and 16-bit ones in the checkpoint's own file: whole they pass, damaged they are named."""
    file = copied / "model.safetensors"
    state = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    opened = Checkpoint.open(copied)
    bundle = exporter.export(copied, tmp_path / "bundle", exporter.ExportOptions(pack=True, verify=False, **options))
    assert differing_weights(bundle, opened) == []
    for method in ("resident", "streamed"):
        comparison = compare_with_checkpoint(bundle, opened, lambda line: None, method=method)
        assert comparison.explanation is None and comparison.worst.error > 0
    key = f"{BACKBONE}layers.1.self_attn.v_proj.weight"
    invert(bundle, key, np.s_[:])
    for method in ("resident", "streamed"):
        comparison = compare_with_checkpoint(bundle, opened, lambda line: None, method=method)
        assert comparison.explanation.startswith("prefix: prefix_v layer 1")
        assert f"weight '{key}' differs from the checkpoint's" in comparison.explanation
        assert "first wrong layer backbone.layers.1.self_attn.v_proj;" in comparison.explanation


def invert(bundle, key, places):
    """Flip the bits of some bytes of a weight, however it is stored."""
    index = bundle.weights()
    entry = index.entries[key if key in index else f"{key}.int8"]
    values = np.memmap(index.path, np.uint8, "r+", entry.offset, (entry.nbytes,))
    values[places] = ~values[places]
    values.flush()


def test_a_damage_too_small_for_the_bars_of_int8_is_found(checkpoint, tmp_path):
    bundle = exporter.export(checkpoint, tmp_path / "bundle", exporter.ExportOptions(precision="int8"))
    assert bundle.manifest.precision == "int8" and bundle.manifest.parity["verified"] is True
    key = f"{EXPERT}layers.1.mlp.down_proj.weight"
    invert(bundle, key, np.s_[7:8])
    comparison = compare_with_checkpoint(bundle, Checkpoint.open(checkpoint), lambda line: None)
    (failure,) = comparison.failures
    assert failure.tensor == "changed_weights" and failure.error == 1
    assert f"weight '{key}' differs from the checkpoint's" in comparison.explanation


def test_the_method_follows_size_and_memory():
    assert choose_method(CONFIG, available=10**9) == "resident"
    assert choose_method(CONFIG, available=10**5) == "streamed"
    assert choose_method(PI05, available=10**12) == "streamed"
    assert choose_method(CONFIG) == "resident"


def test_cases_cover_absent_cameras_short_and_full_prompts_and_batches():
    cases = standard_cases(CONFIG, cameras=1, max_prompt=20, num_steps=4, forced=(3,))
    assert all(case.camera_mask.shape[1] == 2 for case in cases)
    assert any(not case.camera_mask.all() for case in cases)
    assert {int(n) for case in cases for n in case.prompt_mask.sum(axis=1)} == {1, 9, 20}
    assert len({case.noise.tobytes() for case in cases}) == len(cases)


def test_the_compact_case_has_an_absent_camera_padding_and_two_kinds_of_decoding_steps():
    (case,) = compact_cases(PI05, cameras=3, num_steps=10, forced=(3, 5))
    assert case.camera_mask.tolist() == [[True, True, False]]
    assert case.prompt_mask.sum() == 9 and case.prompt_mask.shape == (1, 12)
    assert case.max_tokens == 2 and case.num_steps == 10


def test_bars_of_int8_hold_the_direction_and_refuse_nan():
    bars, reference = bars_of("int8"), np.array([1.0, 2.0, 3.0])
    close = measure("c", "runtime", "actions", [1.1, 1.9, 3.0], reference, bars=bars)
    assert close.passed and close.metric == "cosine distance" and 0 < close.error < 0.01
    assert close.max_abs == pytest.approx(0.1) and close.relative == pytest.approx(np.sqrt(0.02 / 14))
    assert not measure("c", "runtime", "actions", [1.0, 2.0, 0.0], reference, bars=bars).passed
    for bad in ([np.nan, 2.0, 3.0], [np.inf, 2.0, 3.0], [1.0, 2.0]):
        assert not measure("c", "runtime", "actions", bad, reference, bars=bars).passed
    assert measure("c", "runtime", "actions", [0.0], [0.0], bars=bars).passed
    assert not measure("c", "runtime", "actions", [1.0], [0.0], bars=bars).passed
    assert not measure("c", "prefix", "prefix_mask", [True, False], [True, True], bars=bars).passed


def test_ids_may_change_in_int8_and_are_counted():
    bars = bars_of("int8")
    changed = measure("c", "runtime", "greedy_ids", [[5, 6, 1]], [[5, 7, 8, 1]], bars=bars)
    assert changed.passed and changed.error == 0.75
    assert measure("c", "runtime", "greedy_ids", [[5, 6]], [[5, 6]], bars=bars).error == 0.0
    assert not measure("c", "runtime", "greedy_ids", [[5, 6, 1]], [[5, 7, 8, 1]]).passed


def test_a_precision_without_bars():
    with pytest.raises(ArgumentError, match="'fp4'"):
        bars_of("fp4")


def test_samples_of_a_large_output_leave_no_column_out(monkeypatch):
    monkeypatch.setattr(localize, "SAMPLES", 1000)
    for width in (1152, 2048, 4304, 16384):
        columns = sample(np.tile(np.arange(width), 300))
        assert columns.size <= max(1000, 300 * width // 100) and len(set(columns.tolist())) == width
    assert sample(np.arange(999)).size == 999


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    lines = []
    monkeypatch.setattr(progress, "SLOW", 0.0)
    for stream, drawn in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr("sys.stderr", stream)
        reporter = Progress(lines.append)
        with reporter.stage("prefix graph", 2):
            reporter.step("prefix part 1 of 2")
            time.sleep(0.2)  # the bar is not drawn more often than ten times a second
            reporter.step("prefix part 2 of 2")
        reporter.step("outside of a stage")
        assert ("prefix graph" in stream.getvalue() and "2/2" in stream.getvalue()) == drawn
    assert [line.split(" (")[0] for line in lines] == ["prefix graph"] * 2


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
