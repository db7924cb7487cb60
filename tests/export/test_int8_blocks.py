"""Wide layers in 8 bits, computed in blocks: the arithmetic, the weights in the file, and their verification."""

import math

import numpy as np
import onnx
import pytest

from ki_edge.checkpoints import Checkpoint
from ki_export.exporter import export
from ki_export.options import ExportOptions
from ki_export.passes.quantize import quantize
from ki_export.weights.differences import differing_weights

from .test_passes import ops
from .test_quantize import gated_model, linear_model, rounded_product, session


def erf_gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def tanh_gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(("approximate", "gelu"), [("none", erf_gelu), ("tanh", tanh_gelu)])
def test_a_wide_gated_mlp_is_computed_in_blocks(monkeypatch, approximate, gelu, swapped):
    """From gate and up to the sum of what down makes of each block, whose rows are scaled by themselves."""
    monkeypatch.setattr("ki_export.passes.int8_parts.BLOCK", 5)
    rng = np.random.default_rng(5)
    x = rng.standard_normal((2, 3, 24), np.float32) * np.float32([[[1], [30], [0.1]]])
    shapes = {"gate.weight": (10, 24), "up.weight": (10, 24), "down.weight": (4, 10)}
    weights = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    weights["up.weight"][5:] *= 100  # with one scale for the whole row the first block would be rounded away
    weights["down.weight"][:, 5:] /= 100
    model = gated_model("Gelu", swapped=swapped, approximate=approximate)
    quantize(model, lambda name: True)
    assert ops(model).count("MatMulIntegerToFloat") == 6 and ops(model).count("QuantizeLinear") == 3
    assert "Concat" not in ops(model)
    found = [node.attributes["approximate"].value for node in model.graph if node.op_type == "Gelu"]
    assert found == [approximate] * 2  # they differ by less than what is rounded
    names = {name for name in model.graph.initializers if name.startswith(("gate", "down"))}
    parts = [f"{name}.{at}" for name in ("gate.weight.int8", "gate.weight.scale", "down.weight.int8") for at in (0, 1)]
    assert names == {*parts, "down.weight.scale"}
    rows = x.reshape(6, 24)
    gate, up = (rounded_product(rows, weights[name]) for name in ("gate.weight", "up.weight"))
    hidden = gelu(gate) * up
    down = weights["down.weight"]
    scales = np.abs(down).max(axis=1, keepdims=True) / 127  # of whole rows
    rounded = np.rint(down / scales) * scales
    wanted = sum(rounded_rows(hidden[:, block]) @ rounded[:, block].T for block in (slice(0, 5), slice(5, 10)))
    ours = session(model, weights).run(None, {"x": x})[0]
    errors = np.linalg.norm(ours - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    assert np.median(errors) < 1e-5 and errors.max() < 0.02


def rounded_rows(x):
    """x in 8 bits, one scale a row."""
    scales = np.abs(x).max(axis=1, keepdims=True) / 127
    return np.rint(x / scales) * scales


def test_a_wide_layer_by_itself_is_put_together_again(monkeypatch):
    monkeypatch.setattr("ki_export.passes.int8_parts.BLOCK", 5)
    rng = np.random.default_rng(6)
    x, weight = rng.standard_normal((7, 24), np.float32), rng.standard_normal((10, 24), np.float32)
    model = linear_model(bias=True)
    quantize(model, lambda name: name == "layer.weight")
    assert ops(model).count("MatMulIntegerToFloat") == 2 and ops(model).count("Concat") == 1
    offset = rng.standard_normal(10, np.float32)
    ours = session(model, {"layer.weight": weight}, **{"layer.bias": offset}).run(["layer"], {"x": x})[0]
    np.testing.assert_allclose(ours, rounded_product(x, weight) + offset, atol=2e-5)


@pytest.mark.parametrize(("block", "down"), [(20, "down_proj.weight.int8.1"), (8, "down_proj.weight.scale.1")])
def test_a_bundle_of_wide_layers(checkpoint, tmp_path, monkeypatch, block, down):
    """In blocks in the file and in every graph; its verification finds the checkpoint's weights in it, and no others.

    Of 40 inner numbers and a width of 24: with a block of 8 down_proj is itself a wide layer, and takes whole rows.
    """
    monkeypatch.setattr("ki_export.passes.int8_parts.BLOCK", block)
    wide = export(checkpoint, tmp_path / "wide", ExportOptions(precision="int8"))
    graphs = {name: onnx.load(wide.graph(name), load_external_data=False).graph for name in ("prefix", "fast_decode")}
    for graph in graphs.values():
        names = {tensor.name for tensor in graph.initializer}
        assert {f"backbone.layers.0.mlp.{part}" for part in ("gate_proj.weight.int8.1", down)} <= names
    opened = Checkpoint.open(checkpoint)
    assert differing_weights(wide, opened) == []
    places = {
        entry.key: entry.value
        for tensor in graphs["prefix"].initializer
        if tensor.name.endswith("gate_proj.weight.int8.1")
        for entry in tensor.external_data
    }
    with (wide.path / places["location"]).open("r+b") as file:
        file.seek(int(places["offset"]))
        byte = file.read(1)
        file.seek(int(places["offset"]))
        file.write(bytes([byte[0] ^ 1]))
    (changed,) = differing_weights(wide, opened)
    assert changed.endswith("gate_proj.weight")


def test_a_block_that_points_at_another_one_is_found(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("ki_export.passes.int8_parts.BLOCK", 20)
    bundle = export(checkpoint, tmp_path / "wide", ExportOptions(precision="int8", verify=False))
    model = onnx.load(bundle.graph("prefix"), load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    first, second = (tensors[f"backbone.layers.0.mlp.up_proj.weight.int8.{at}"] for at in (0, 1))
    second.external_data[1].value = first.external_data[1].value
    assert second.external_data[1].key == "offset"
    onnx.save(model, bundle.graph("prefix"))
    (changed,) = differing_weights(bundle, Checkpoint.open(checkpoint))
    assert changed.endswith("up_proj.weight")


def test_weights_in_one_are_verified_too(checkpoint, tmp_path):
    """As in every layer of a small model, and in all of bundles before there were blocks."""
    bundle = export(checkpoint, tmp_path / "bundle", ExportOptions(precision="int8", verify=False))
    assert differing_weights(bundle, Checkpoint.open(checkpoint)) == []
