"""Attention as one operator: the same results, within the rounding of the type."""

import numpy as np
import onnx_ir as ir
import pytest

from ki_edge.errors import ArgumentError
from ki_export.arithmetic.session import arithmetic_sampler
from ki_export.exporter import export
from ki_export.options import ExportOptions
from ki_export.parity.cases import standard_cases
from ki_export.passes.attention import fuse_attention
from ki_export.passes.lower import lower
from ki_export.passes.products import VALUES


@pytest.fixture(scope="module")
def fused(checkpoint, tmp_path_factory):
    options = ExportOptions(target="trt", attention="fused")
    return export(checkpoint, tmp_path_factory.mktemp("fused") / "bundle", options)


def test_every_attention_is_one_operator(traced):
    for name, attentions in (("prefix", 2), ("denoise", 2), ("fast_decode", 2)):
        model = traced[name]
        lower(model, ir.DataType.FLOAT16, lambda site: False)
        assert fuse_attention(model) == attentions
        kinds = [node.op_type for node in model.graph]
        assert kinds.count("Attention") == attentions and "Softmax" not in kinds and "MatMul" not in kinds
        assert model.opset_imports[""] == 23 and model.ir_version >= 11


def test_attention_kept_in_float32_stays_apart(traced):
    lower(traced["denoise"], ir.DataType.FLOAT16, lambda site: site.endswith(VALUES))
    assert fuse_attention(traced["denoise"]) == 0
    assert traced["denoise"].opset_imports[""] == 20


def test_the_fused_bundle_holds_the_same_bars(fused, checkpoint):
    assert fused.manifest.parity["verified"] and fused.manifest.graphs["prefix"]["opset"] == 23
    assert "Attention" in fused.manifest.graphs["denoise"]["ops"]
    apart = export(
        checkpoint, fused.path.parent / "apart", ExportOptions(target="trt", attention="decomposed", verify=False)
    )
    one, other = arithmetic_sampler(fused), arithmetic_sampler(apart)
    for case in standard_cases(fused.manifest.config, cameras=2, max_prompt=20, num_steps=4, forced=(3, 5)):
        given = one.sample_actions(*case.inputs, noise=case.noise)
        expected = other.sample_actions(*case.inputs, noise=case.noise)
        np.testing.assert_allclose(given, expected, atol=2e-3)


@pytest.mark.parametrize("options", [{"target": "trt", "precision": "fp32"}, {"target": "ort", "precision": "fp16"}])
def test_float32_and_other_engines_are_refused(options):
    with pytest.raises(ArgumentError, match="attention fused is for targets trt and trt-rtx in fp16 or bf16"):
        ExportOptions(attention="fused", **options)
