"""16-bit exports end to end: a model whose activations leave float16's range, in arithmetic that really rounds."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import ki_export.precision.sixteen_bits
from ki_edge.bundle import Bundle
from ki_edge.checkpoints import Checkpoint
from ki_edge.checkpoints.layout.keys import EMBEDDING
from ki_edge.errors import BackendError, ExportError
from ki_edge.model import Observation, load_model, save_checkpoint
from ki_export.arithmetic.session import arithmetic_sampler
from ki_export.cli import main
from ki_export.exporter import export
from ki_export.options import ExportOptions
from ki_export.parity.parity import compare_with_checkpoint
from ki_export.parity.recorded import compare_with_recording
from ki_export.precision.decision import Decision
from ki_export.weights.differences import differing_weights
from ki_export.weights.weights import StorageFormat, place_weights

DATA = Path(__file__).parents[1] / "data"
HOT = "backbone.layers.0.mlp"  # feeds the actions; the last layer's MLP serves FAST alone
LAYER = "paligemma_with_expert.paligemma.model.language_model.layers.0."
OBSERVATIONS = 24


def heat(model, layer=0):
    """Scale an MLP as the largest activations of language models are: its product passes 65504, its result does not."""
    mlp = model.backbone.layers[layer].mlp
    with torch.no_grad():
        mlp.gate_proj.weight.mul_(256)
        mlp.up_proj.weight.mul_(256)
        mlp.down_proj.weight.mul_(2.0**-16)
    return model


@pytest.fixture(scope="module")
def hot(tmp_path_factory, small_model):
    folder = tmp_path_factory.mktemp("hot") / "checkpoint"
    save_checkpoint(heat(small_model(seed=1)), folder)
    return folder


@pytest.fixture(scope="module")
def exported(hot, tmp_path_factory):
    return export(hot, tmp_path_factory.mktemp("hot") / "bundle", ExportOptions(target="trt", model_only=True))


def observations(config, count):
    rng = np.random.default_rng(7)
    for at in range(count):
        cameras, tokens, size = 1 + at % 3, 1 + 5 * (at % 4), config.vision.image_size
        images = rng.integers(0, 256, (1, cameras, size, size, 3)).astype(np.uint8)
        prompt = rng.integers(2, config.vocab_size, (1, tokens))
        noise = rng.standard_normal((1, config.action_horizon, config.action_dim), np.float32)
        yield (images, np.ones((1, cameras), bool), prompt, np.ones((1, tokens), bool)), noise


def actions_of(model, inputs, noise):
    observation = Observation(*map(torch.from_numpy, inputs))
    return model.sample_actions(observation, noise=torch.from_numpy(noise), num_steps=10).detach().numpy()


def test_float16_holds_the_bars_where_activations_pass_65504(exported, hot):
    model, sampler = load_model(Checkpoint.open(hot)), arithmetic_sampler(exported)
    for inputs, noise in observations(model.config, OBSERVATIONS):
        expected, given = actions_of(model, inputs, noise), sampler.sample_actions(*inputs, noise=noise)
        assert np.isfinite(given).all() and np.abs(given - expected).max() <= 5e-3
        cosine = np.vdot(given, expected) / (np.linalg.norm(given) * np.linalg.norm(expected))
        assert cosine >= 0.99999


def test_what_was_audited_and_done_is_in_manifest_and_report(exported):
    found = json.loads((exported.path / "ranges.json").read_text())
    product = max(found["ranges"], key=lambda entry: entry["input"]["largest"])
    assert product["site"] == f"{HOT}.down_proj" and product["input"]["largest"] > 65504 and product["headroom"] < 1
    assert found["factors"][f"{HOT}.down_proj"] - found["exponents"].get(f"{HOT}.down_proj", 0) >= 4
    manifest = exported.manifest
    assert manifest.precision == "float16" and manifest.parity["verified"]
    assert manifest.provenance["calibration"] == "built-in: 8 synthetic observations"
    assert set(manifest.weights["exponents"]) == {
        f"paligemma_with_expert.paligemma.model.language_model.layers.0.mlp.{part}_proj.weight"
        for part in ("up", "down")
    }
    page = (exported.path / "parity.html").read_text()
    assert "Range audit" in page and f"{HOT}.down_proj" in page and "Largest values by layer" in page


def test_the_naive_cast_is_not_finite(hot, tmp_path, monkeypatch):
    """The same graphs without scaling, as exporters that only cast write them."""
    monkeypatch.setattr(ki_export.precision.sixteen_bits, "decide", lambda *_: Decision("fp16"))
    naive = export(hot, tmp_path / "naive", ExportOptions(target="trt", model_only=True, verify=False))
    inputs, noise = next(observations(naive.manifest.config, 1))
    with pytest.raises(BackendError, match=r"denoise graph in float16 gave .* NaN or infinite"):
        arithmetic_sampler(naive).sample_actions(*inputs, noise=noise)
    with torch.no_grad():  # and so is the model itself, cast to float16
        half = load_model(Checkpoint.open(hot), dtype=torch.float16)
        hidden = torch.randn(1, 4, half.config.backbone.width).half() * 2
        assert not torch.isfinite(half.backbone.layers[0].mlp(hidden)).all()


def test_a_naive_export_fails_its_proof(hot, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ki_export.precision.sixteen_bits, "decide", lambda *_: Decision("fp16"))
    assert main([str(hot), "-o", str(tmp_path / "b"), "--target", "trt", "--model-only"]) == 1
    assert "not finite" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_bfloat16_is_no_further_away_than_openpis_own(tmp_path):
    """On openpi's golden checkpoint, against its recorded bfloat16 run."""
    bundle = export(DATA / "openpi_a", tmp_path / "b", ExportOptions(target="trt", precision="bf16", model_only=True))
    inputs, outputs = (np.load(DATA / "openpi_a" / f"{name}.npz") for name in ("inputs", "outputs"))
    theirs = np.abs(np.load(DATA / "openpi_a" / "actions_bf16.npy") - outputs["actions"]).max()
    cameras = [name.removeprefix("image/") for name in inputs.files if name.startswith("image/")]
    given = arithmetic_sampler(bundle).sample_actions(
        np.stack([inputs[f"image/{camera}"] for camera in cameras], axis=1),
        np.stack([inputs[f"image_mask/{camera}"] for camera in cameras], axis=1),
        inputs["tokenized_prompt"],
        inputs["tokenized_prompt_mask"],
        noise=inputs["noise"],
        num_steps=int(inputs["num_steps"]),
    )
    ours = np.abs(given - outputs["actions"]).max()
    assert 1e-6 < ours <= theirs  # and it is bfloat16, not float32


@pytest.mark.parametrize(("precision", "bar"), [("fp16", 5e-3), ("bf16", 5e-2)])
def test_recordings_are_compared_in_the_arithmetic_of_the_type(tmp_path, precision, bar):
    """ONNX Runtime would widen float16 on a CPU, and has no bfloat16 there."""
    options = ExportOptions(target="trt", precision=precision, model_only=True, verify=False)
    bundle = export(DATA / "openpi_a", tmp_path / "b", options)
    found = {m.tensor: m for m in compare_with_recording(bundle, DATA / "openpi_a" / "outputs.npz").measurements}
    assert found["actions"].limit == bar and found["actions"].error > 2e-5  # coarser than float32
    assert found["actions_direction"].passed and (precision == "bf16" or found["actions"].passed)


def test_weights_are_stored_in_their_types(exported):
    index = exported.weights()
    types = {name: entry.dtype for name, entry in index.entries.items()}
    assert types[LAYER + "mlp.up_proj.weight"] == "F16" and types[LAYER + "input_layernorm.weight"] == "F32"
    assert types["action_out_proj.weight"] == "F32" and not any("lm_head" in name for name in types if "expert" in name)


def test_a_damaged_weight_is_noticed(exported, hot, tmp_path):
    copy = shutil.copytree(exported.path, tmp_path / "copy")
    bundle, checkpoint = Bundle.open(copy), Checkpoint.open(hot)
    assert differing_weights(bundle, checkpoint) == []
    key = LAYER + "mlp.up_proj.weight"
    entry = bundle.weights().entries[key]
    with (copy / "weights.safetensors").open("r+b") as file:
        file.seek(entry.offset + 10)
        file.write(b"\x00\x3c")
    assert differing_weights(bundle, checkpoint) == [key]
    comparison = compare_with_checkpoint(bundle, checkpoint, lambda _: None)
    assert comparison.explanation is not None and key in comparison.explanation


def test_kept_products_are_float32_and_told(hot, tmp_path, capsys):
    out = tmp_path / "b"
    arguments = [str(hot), "-o", str(out), "--target", "trt", "--model-only", "--no-verify", "--keep-fp32", "vision.*"]
    assert main(arguments) == 0
    assert "vision.encoder.layers.0.mlp.fc1 stays float32: --keep-fp32 vision.*" in capsys.readouterr().err
    types = {name: entry.dtype for name, entry in Bundle.open(out).weights().entries.items()}
    assert {dtype for name, dtype in types.items() if "vision_tower" in name} == {"F32"}


def test_sensitivity_tells_every_layer_apart(hot, tmp_path):
    options = ExportOptions(target="trt", model_only=True, verify=False, sensitivity=True)
    bundle = export(hot, tmp_path / "b", options)
    costs = json.loads((bundle.path / "ranges.json").read_text())["sensitivity"]
    groups = [cost["group"] for cost in costs]
    layers = ("expert.layers.0", "expert.layers.1", "backbone.layers.0", "vision.encoder.layers.0")
    assert {f"{layer}.{part}" for layer in layers for part in ("self_attn", "mlp")} < set(groups)
    assert len(groups) == len(set(groups)) == 2 * 4 + 2  # the projector, K and V of the last layer
    errors = [cost["error"] for cost in costs]
    assert errors == sorted(errors, reverse=True) and errors[-1] > 0 and errors[0] < 5e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "trt", "--stored-types"], "precision fp16 stores its own: leave one out"),
        (["--calibrate", "."], "--calibrate, --keep-fp32 and --sensitivity are for"),
        (["--target", "trt", "--precision", "bf16", "--calibrate", "."], "--calibrate has no effect with bf16"),
        (["--target", "trt", "--keep-fp32", "nothing.*"], "--keep-fp32 'nothing.*' fits no matrix product"),
        (["--target", "trt", "--calibrate", "missing.npz"], "--calibrate missing.npz: no such file or folder"),
        (["--precision", "fp9"], "precision 'fp9': expected one of fp32, fp16, bf16, int8, fp8, nvfp4"),
        (["--target", "tensorrt"], "target 'tensorrt': expected one of ort, openvino, trt, trt-rtx"),
    ],
)
def test_wrong_requests_are_one_line(hot, tmp_path, capsys, arguments, message):
    assert main([str(hot), "-o", str(tmp_path / "b"), "--model-only", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("ki-export: error: ") and message in error
    assert list(tmp_path.iterdir()) == []


def test_a_model_beyond_float16_is_refused_and_bfloat16_offered(tmp_path, small_model):
    model = small_model(seed=2)
    with torch.no_grad():
        model.backbone.embed_tokens.weight[3, 3] = 1e5
    save_checkpoint(model, tmp_path / "c")
    with pytest.raises(ExportError, match=r"float16 does not fit.*backbone\.embed_tokens.*use --precision bf16"):
        export(tmp_path / "c", tmp_path / "b", ExportOptions(target="trt", model_only=True))
    export(tmp_path / "c", tmp_path / "b", ExportOptions(target="trt", precision="bf16", model_only=True))


def test_a_weight_that_no_observation_used_is_refused_when_it_is_written(tmp_path, small_model):
    model = small_model(seed=2)
    with torch.no_grad():
        model.backbone.embed_tokens.weight[3, 3] = 1e5
    save_checkpoint(model, tmp_path / "c")
    with pytest.raises(ExportError, match=r"embed_tokens.*holds 1e\+05, and float16 ends at 65504.*--precision bf16"):
        place_weights(Checkpoint.open(tmp_path / "c"), tmp_path, [EMBEDDING], forms={EMBEDDING: StorageFormat("F16")})


def test_precisions_of_each_target():
    assert ExportOptions().precision == "fp32" and ExportOptions(target="trt-rtx").precision == "fp16"
    assert ExportOptions(precision="int8").recorded_precision == "int8"
    assert ExportOptions(target="trt", precision="int8").recorded_precision == "int8_static"
