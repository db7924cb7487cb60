"""weights.safetensors: packed or converted; and the writer that streams it. The rest is in test_owned_weights.py."""

import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ki_edge.bundle import Bundle, sha256
from ki_edge.checkpoints import Checkpoint
from ki_edge.errors import CheckpointError, ExportError
from ki_edge.files.safetensors_index import SafetensorsIndex
from ki_edge.model import load_model
from ki_edge.model.checkpoint import FLOAT32
from ki_export.exporter import export
from ki_export.options import ExportOptions
from ki_export.weights import weights
from ki_export.weights.safetensors_writer import Part, write_tensors
from ki_export.weights.weights import place_weights
from ki_runtime.policy.sampler import Sampler

from .conftest import OPENPI_KEYS


def inputs(config, batch=1):
    size, rng = config.vision.image_size, np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, 2, size, size, 3), dtype=np.uint8)
    tokens = rng.integers(2, 300, (batch, 7))
    return images, np.ones((batch, 2), np.bool_), tokens, np.ones((batch, 7), np.bool_)


def noise(config):
    shape = (1, config.action_horizon, config.action_dim)
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def test_pack_keeps_what_is_used_and_no_more(checkpoint, bundle, tmp_path):
    packed = export(checkpoint, tmp_path / "packed", ExportOptions(pack=True, verify=False))
    before, after = bundle.weights(), packed.weights()
    dropped = set(before.entries) - set(after.entries)
    # the expert's output layer belongs to no graph; the tied embedding, stored as lm_head, gets its own name
    assert dropped == {"paligemma_with_expert.gemma_expert.lm_head.weight", OPENPI_KEYS.lm_head}
    for name in after.entries:
        stored = OPENPI_KEYS.lm_head if name == OPENPI_KEYS.embedding else name
        np.testing.assert_array_equal(after.array(name), before.array(stored))
    config, x = packed.manifest.config, noise(packed.manifest.config)
    actions = [Sampler.open(b, threads=1).sample_actions(*inputs(config), noise=x) for b in (bundle, packed)]
    np.testing.assert_array_equal(*actions)
    assert packed.manifest.provenance["weights"] == "packed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_checkpoints_are_widened_exactly(copied, tmp_path, monkeypatch, dtype):
    """As openpi deploys: most tensors in 16 bits, some in float32. Pieces are smaller than a tensor here."""
    monkeypatch.setattr("ki_edge.checkpoints.layout.source.PIECE", 37)
    file = copied / "model.safetensors"
    state = {k: v if FLOAT32.search(k) else v.to(dtype) for k, v in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    exported = export(copied, tmp_path / "bundle", ExportOptions())
    assert exported.manifest.provenance["weights"] == "converted"
    written = load_file(exported.path / "weights.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in written.values())
    state[OPENPI_KEYS.embedding] = state[OPENPI_KEYS.lm_head]
    for name, tensor in written.items():
        assert torch.equal(tensor, state[name].float())
    model, config = load_model(Checkpoint.open(copied)), exported.manifest.config
    x = noise(config)
    actions = Sampler.open(exported, threads=1).sample_actions(*inputs(config), noise=x, num_steps=10)
    from ki_edge.model import Observation

    expected = model.sample_actions(Observation(*map(torch.from_numpy, inputs(config))), noise=torch.from_numpy(x))
    np.testing.assert_allclose(actions, expected.numpy(), atol=2e-5, rtol=0)


def test_the_lerobot_layout_with_both_embeddings(copied, tmp_path):
    """The graphs use embed_tokens, not the lm_head beside it."""
    file = copied / "model.safetensors"
    state = {f"model.{key}": value for key, value in load_file(file).items()}
    state[f"model.{OPENPI_KEYS.embedding}"] = state[f"model.{OPENPI_KEYS.lm_head}"].clone()
    state[f"model.{OPENPI_KEYS.lm_head}"] = torch.full_like(state[f"model.{OPENPI_KEYS.lm_head}"], float("nan"))
    save_file(state, file)
    exported = export(copied, tmp_path / "bundle", ExportOptions(model_only=True))
    assert exported.manifest.parity["verified"]
    assert exported.manifest.provenance["format"] == "ki-train"  # by the contract beside it


def test_stored_types_keep_the_checkpoints_16_bit_file(copied, tmp_path):
    """--stored-types: nothing is converted, the graphs widen, and the actions are those of the float32 bundle."""
    file = copied / "model.safetensors"
    state = {k: v if FLOAT32.search(k) else v.bfloat16() for k, v in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    kept = export(copied, tmp_path / "kept", ExportOptions(weights="stored"))
    assert kept.manifest.provenance["weights"] in ("copied", "reflinked") and kept.manifest.parity["verified"]
    assert (kept.path / "weights.safetensors").read_bytes() == file.read_bytes()
    widened = export(copied, tmp_path / "widened", ExportOptions(verify=False))
    config = widened.manifest.config
    actions = [Sampler.open(b, threads=1).sample_actions(*inputs(config), noise=noise(config)) for b in (kept, widened)]
    np.testing.assert_array_equal(*actions)
    packed = export(copied, tmp_path / "packed", ExportOptions(weights="stored", pack=True, verify=False))
    assert packed.manifest.provenance["weights"] == "packed"
    given, state[OPENPI_KEYS.embedding] = load_file(packed.path / "weights.safetensors"), state[OPENPI_KEYS.lm_head]
    assert all(torch.equal(tensor, state[name]) for name, tensor in given.items())


def test_hashes_are_those_of_the_files(checkpoint, tmp_path):
    for name, options in {"copied": {}, "linked": {"link": True}, "packed": {"pack": True}}.items():
        exported = export(checkpoint, tmp_path / name, ExportOptions(verify=False, **options))
        Bundle.open(exported.path, verify=True)
        recorded = exported.manifest.provenance["sha256"]
        assert recorded == {"model.safetensors": sha256(checkpoint / "model.safetensors")}


def test_a_checkpoint_that_changes_while_it_is_read(copied, tmp_path, monkeypatch):
    def touch(*arguments, **options):
        placed = place_weights(*arguments, **options)
        os.utime(copied / "model.safetensors", ns=(0, 0))
        return placed

    monkeypatch.setattr("ki_export.exporter.place_weights", touch)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        export(copied, tmp_path / "bundle", ExportOptions(verify=False))
    assert [path.name for path in tmp_path.iterdir() if "bundle" in path.name] == []


def test_written_files_open_with_the_official_reader(tmp_path):
    rng = np.random.default_rng(0)
    values = {"b": rng.standard_normal((3, 5), np.float32), "a": rng.integers(-127, 128, (7, 2)).astype(np.int8)}
    kinds = {"b": "F32", "a": "I8"}
    parts = [Part(name, kinds[name], values[name].shape, lambda name=name: iter(values[name])) for name in values]
    digest = write_tensors(tmp_path / "out.safetensors", parts, {"who": "me"})
    assert digest == sha256(tmp_path / "out.safetensors")
    written = load_file(tmp_path / "out.safetensors")
    assert all(np.array_equal(written[name].numpy(), values[name]) for name in values)
    result = SafetensorsIndex(tmp_path / "out.safetensors")
    assert result.metadata == {"who": "me"}
    assert min(entry.offset for entry in result.entries.values()) % 64 == 0


def test_a_part_of_the_wrong_size_is_noticed(tmp_path):
    part = Part("x", "F32", (3,), lambda: iter([np.zeros(2, np.float32)]))
    with pytest.raises(ExportError, match="'x' has 8 bytes, its shape says 12"):
        write_tensors(tmp_path / "out.safetensors", [part], {})


def test_a_disk_that_fills_up_while_writing_leaves_the_old_bundle(checkpoint, tmp_path, largest_file):
    old = export(checkpoint, tmp_path / "bundle", ExportOptions(verify=False))
    before = {path: path.read_bytes() for path in old.path.iterdir() if path.is_file()}

    with (
        largest_file(50_000),
        pytest.raises(ExportError, match=r"cannot write \S+/weights\.safetensors: File too large"),
    ):
        export(checkpoint, tmp_path / "bundle", ExportOptions(verify=False, pack=True, force=True))
    assert {path: path.read_bytes() for path in old.path.iterdir() if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_full_disk_is_noticed_before_writing(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ExportError, match="GB are free"):
        place_weights(Checkpoint.open(checkpoint), tmp_path, [OPENPI_KEYS.embedding], pack=True)
    assert list(tmp_path.iterdir()) == []


def test_a_weight_of_another_shape_is_refused(checkpoint, tmp_path):
    import onnx_ir as ir

    opened = Checkpoint.open(checkpoint)
    placed = place_weights(opened, tmp_path, [OPENPI_KEYS.embedding], pack=True)
    value = ir.Value(name="w", shape=ir.Shape([3, 3]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([], [], nodes=[], initializers=[value], name="g")
    with pytest.raises(ExportError, match="'w' is"):
        weights.attach(ir.Model(graph, ir_version=9), {"w": weights.TensorSlice(OPENPI_KEYS.embedding)}, placed)
