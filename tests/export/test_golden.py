"""Exports of the golden checkpoints agree with what openpi, LeRobot and the KI reference recorded."""

import json

import numpy as np
import pytest
import torch

from ki_edge.checkpoints import Checkpoint
from ki_edge.model import load_model
from ki_export.exporter import export
from ki_export.options import ExportOptions
from ki_export.parity import cli as parity_cli
from ki_export.parity.recorded import compare_with_recording

BAR = 2e-5  # absolute, whatever the tensor's magnitude: these models are small


@pytest.fixture(scope="module", params=["openpi_a", "lerobot_a", "ki"])
def golden(request, data, tmp_path_factory):
    folder = data / request.param
    return folder, export(folder, tmp_path_factory.mktemp("golden") / "bundle", ExportOptions(model_only=True))


def test_recorded_outputs(golden):
    folder, bundle = golden
    comparison = compare_with_recording(bundle, folder / "outputs.npz")
    compared = {m.tensor for m in comparison.measurements}
    expected = {"times", "prefix_k", "prefix_v", "x", "actions"} if folder.name != "ki" else {"greedy_ids"}
    assert compared == expected
    assert comparison.explanation is None
    assert max(m.error for m in comparison.measurements) <= BAR


def test_every_comparison_with_pytorch_within_the_absolute_bar(golden):
    folder, bundle = golden
    report = json.loads((bundle.path / "parity.json").read_text())
    errors = {(m["graph"], m["tensor"]): m["error"] for m in report["measurements"]}
    assert {graph for graph, _ in errors} == {"prefix", "denoise", "fast_decode", "runtime"}
    assert max(m["error"] for m in report["measurements"]) <= BAR
    assert bundle.manifest.sampling["time_convention"] == Checkpoint.open(folder).format


def test_the_wrong_time_convention_is_named(data, golden, capsys):
    folder, bundle = golden
    if folder.name != "openpi_a":
        pytest.skip("once is enough")
    status = parity_cli.main([str(bundle.path), "--outputs", str(data / "lerobot_a" / "outputs.npz")])
    assert status == 1
    assert "other time convention" in capsys.readouterr().err
    status = parity_cli.main([str(bundle.path), "--outputs", str(folder / "outputs.npz")])
    assert status == 0
    assert "actions" in capsys.readouterr().out


def test_tied_and_untied_embeddings_give_one_table(data, golden):
    """LeRobot stores embed_tokens and lm_head; the trained one is embed_tokens, and both graphs point at it."""
    folder, bundle = golden
    checkpoint = Checkpoint.open(folder)
    tensors = checkpoint.source.tensors
    key = next(key for key in tensors if key.endswith("embed_tokens.weight"))
    stored = bundle.weights().array(tensors[key].place.name)
    model = load_model(checkpoint)
    np.testing.assert_array_equal(stored, model.backbone.embed_tokens.weight.detach().numpy())
    assert model.backbone.embed_tokens.weight.dtype == torch.float32
