"""weights.safetensors: linked, copied, packed or converted; and the writer that streams it."""

import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ki_edge.errors import ExportError
from ki_edge.model import Checkpoint
from ki_edge.model.checkpoint import FLOAT32
from ki_edge.safetensors_index import SafetensorsIndex
from ki_export import safetensors_writer, weights
from ki_export.exporter import ExportOptions, export
from ki_export.safetensors_writer import write_float32
from ki_export.weights import place_weights
from ki_runtime.sampler import Sampler

from .conftest import OPENPI_KEYS


def inputs(config, batch=1):
    size, rng = config.vision.image_size, np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, 2, size, size, 3), dtype=np.uint8)
    tokens = rng.integers(2, 300, (batch, 7))
    return images, np.ones((batch, 2), np.bool_), tokens, np.ones((batch, 7), np.bool_)


def noise(config):
    shape = (1, config.action_horizon, config.action_dim)
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def test_float32_checkpoints_are_linked(checkpoint, bundle):
    linked, own = bundle.path / "weights.safetensors", checkpoint / "model.safetensors"
    assert linked.stat().st_ino == own.stat().st_ino
    assert bundle.manifest.provenance["weights"] == "linked"


def test_another_filesystem_gets_a_copy(checkpoint, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    placed = place_weights(Checkpoint.open(checkpoint), tmp_path, ["time_mlp_in.weight"], pack=False)
    assert placed.how == "copied"
    assert (tmp_path / "weights.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert (tmp_path / "weights.safetensors").stat().st_ino != (checkpoint / "model.safetensors").stat().st_ino


def test_other_link_errors_are_errors(checkpoint, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(ExportError, match="Input/output error"):
        place_weights(Checkpoint.open(checkpoint), tmp_path, ["time_mlp_in.weight"], pack=False)


def test_pack_keeps_what_is_used_and_no_more(checkpoint, bundle, tmp_path):
    packed = export(checkpoint, tmp_path / "packed", ExportOptions(pack=True, verify=False))
    before, after = bundle.weights(), packed.weights()
    dropped = set(before.entries) - set(after.entries)
    # the expert's output layer belongs to no graph; the tied embedding is stored as lm_head and stays
    assert dropped == {"paligemma_with_expert.gemma_expert.lm_head.weight"}
    for name in after.entries:
        np.testing.assert_array_equal(after.array(name), before.array(name))
    config, x = packed.manifest.config, noise(packed.manifest.config)
    actions = [Sampler.open(b, threads=1).sample_actions(*inputs(config), noise=x) for b in (bundle, packed)]
    np.testing.assert_array_equal(*actions)
    assert packed.manifest.provenance["weights"] == "packed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_checkpoints_are_widened_exactly(copied, tmp_path, monkeypatch, dtype):
    """As openpi deploys: most tensors in 16 bits, some in float32. Pieces are smaller than a tensor here."""
    monkeypatch.setattr(safetensors_writer, "PIECE", 37)
    file = copied / "model.safetensors"
    state = {k: v if FLOAT32.search(k) else v.to(dtype) for k, v in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    exported = export(copied, tmp_path / "bundle", ExportOptions())
    assert exported.manifest.provenance["weights"] == "converted"
    written = load_file(exported.path / "weights.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in written.values())
    for name, tensor in written.items():
        assert torch.equal(tensor, state[name].float())
    model, config = Checkpoint.open(copied).load_model(), exported.manifest.config
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
    assert exported.manifest.sampling["time_convention"] == "lerobot"
    assert exported.manifest.provenance["layout"] == "lerobot"


def test_written_files_open_with_the_official_reader(tmp_path):
    torch.manual_seed(0)
    state = {"b": torch.randn(3, 5), "a": torch.randn(7).bfloat16(), "c": torch.randn(2, 1, 4).half()}
    save_file(state, tmp_path / "in.safetensors", metadata={"who": "me"})
    index = SafetensorsIndex(tmp_path / "in.safetensors")
    write_float32(index, ["c", "a", "b"], tmp_path / "out.safetensors")
    written = load_file(tmp_path / "out.safetensors")
    assert {name: torch.equal(tensor, state[name].float()) for name, tensor in written.items()} == dict.fromkeys(
        "abc", True
    )
    result = SafetensorsIndex(tmp_path / "out.safetensors")
    assert result.metadata == {"who": "me", "format": "pt"}
    assert min(entry.offset for entry in result.entries.values()) % 64 == 0


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
        weights.attach(ir.Model(graph, ir_version=9), {"w": weights.Rows(OPENPI_KEYS.embedding)}, placed)
