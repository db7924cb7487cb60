"""--embeddings host: the table stays in the weights file, and whatever a bundle computes is the same, bit for bit."""

import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest

from ki_edge import graphs
from ki_edge.bundle import Bundle
from ki_edge.bundle.witness import read_witness
from ki_edge.checkpoints import Checkpoint
from ki_edge.checkpoints.layout.keys import BACKBONE
from ki_edge.errors import ArgumentError, BundleError
from ki_export.arithmetic.session import arithmetic_sampler
from ki_export.exporter import export
from ki_export.options import ExportOptions
from ki_export.parity.parity import compare_with_checkpoint
from ki_export.weights.differences import differing_weights
from ki_runtime import Sampler
from ki_runtime.policy.embeddings import EmbeddingTable, table_of
from ki_runtime.policy.proving import repeat_proof
from ki_runtime.trt.profiles import profiles

from .conftest import CONFIG

TABLE = "backbone.embed_tokens.weight"
EVERY = {"full_vocabulary": True}  # fast_decode answers in words too
FORMS = {
    "fp32": ExportOptions(**EVERY),
    "stored": ExportOptions(weights="stored", **EVERY),
    "int8": ExportOptions(precision="int8", **EVERY),
    "fp16": ExportOptions(target="trt", rtc=True),
    "bf16": ExportOptions(target="trt", precision="bf16"),
    "fused": ExportOptions(target="trt", precision="bf16", attention="fused"),
    "int8 of engines": ExportOptions(target="trt", precision="int8"),
    "fp8": ExportOptions(target="trt-rtx", precision="fp8"),
}


def questions(config=CONFIG):
    """A batch of two: cameras of their own, prompts of unlike lengths, with the first and the last token."""
    random = np.random.default_rng(3)
    images = random.integers(0, 256, (2, 2, 14, 14, 3), np.uint8)
    tokens = random.integers(0, config.vocab_size, (2, 9))
    tokens[0, :2] = 0, config.vocab_size - 1
    lengths = np.array([[9], [4]])
    return images, np.array([[True, True], [True, False]]), tokens, np.arange(9)[None] < lengths


def answers(bundle, form):
    sampler = arithmetic_sampler(bundle) if FORMS[form].sixteen else Sampler.open(bundle.path, "ort", threads=1)
    inputs = questions()
    found = [sampler.sample_actions(*inputs, seed=1), sampler.trace(*inputs, seed=1).prefix_k]
    constrained = not FORMS[form].full_vocabulary
    found.append(sampler.sample_fast_tokens(*inputs, max_tokens=5, forced=[7, 600], constrained=constrained))
    if FORMS[form].full_vocabulary:
        found.append(sampler.sample_text_tokens(*inputs, allowed=range(2, 600), eos_id=1, max_tokens=5))
    return found


@pytest.fixture(scope="module")
def pairs(checkpoint, tmp_path_factory):
    """pairs(form) -> the bundle whose graphs hold the table, and that whose table stays in the file."""
    made = {}

    def make(form):
        if form not in made:
            folder, options = tmp_path_factory.mktemp(form), replace(FORMS[form], verify=False)
            host = export(checkpoint, folder / "host", replace(options, embeddings="host"))
            made[form] = export(checkpoint, folder / "graph", options), host
        return made[form]

    return make


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("fused", "fp8")])
def test_the_same_results_bit_for_bit(pairs, form):
    graph, host = pairs(form)
    for ours, theirs in zip(answers(host, form), answers(graph, form), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("form", FORMS)
def test_no_graph_holds_the_table_but_for_the_logits_of_every_token(pairs, form):
    graph, host = pairs(form)
    for name, told in host.manifest.graphs.items():
        proto = onnx.load(host.graph(name), load_external_data=False).graph
        whole = name == "fast_decode" and FORMS[form].full_vocabulary
        assert (TABLE in {tensor.name for tensor in proto.initializer}) is whole
        spec = {spec.name: spec for spec in graphs.specs(host.manifest.config, fast=True)}[name]
        assert [value.name for value in proto.input] == [tensor.name for tensor in spec.inputs]
        rows = [tensor["name"] for tensor in told["inputs"] if tensor["name"] in graphs.EMBEDDINGS]
        assert len(rows) == (name != "denoise")
        saved = graph.manifest.graphs[name]["weight_bytes"] - told["weight_bytes"]
        table = CONFIG.vocab_size * CONFIG.backbone.width * (2 if FORMS[form].sixteen else 4)
        assert saved == (0 if name == "denoise" or whole else table) or form == "stored"
    assert host.manifest.weights["embeddings"] in host.weights()
    assert "embeddings" not in graph.manifest.weights and "embeddings" not in graph.manifest.model


def test_the_proof_at_the_export_its_repetition_and_the_witness(checkpoint, tmp_path):
    """Parity in every case, in float32 and in the arithmetic of 16 bits; what it wrote down is proven again."""
    for form in ("fp32", "fp16"):
        options = replace(FORMS[form], embeddings="host")
        bundle = export(checkpoint, tmp_path / form, options)
        assert bundle.manifest.parity["verified"] is True and len(read_witness(bundle)) > 1
        assert differing_weights(bundle, Checkpoint.open(checkpoint)) == []
    bundle = Bundle.open(tmp_path / "fp32")
    assert compare_with_checkpoint(bundle, Checkpoint.open(checkpoint), print).failures == []
    assert [verdict.passed for verdict in repeat_proof(bundle, "ort", print)] == [True, True]
    (profile,) = profiles(bundle)["prefix"]
    assert profile["prompt_embeddings"][2] == (1, 32, CONFIG.backbone.width)  # prompts of up to 20 tokens, padded


def test_a_table_that_is_not_the_checkpoints_is_told(checkpoint, pairs):
    _, host = pairs("fp16")
    path, entry = host.path / "weights.safetensors", host.weights().entries[host.manifest.weights["embeddings"]]
    content = bytearray(path.read_bytes())
    content[entry.offset + 1] ^= 1
    before = path.read_bytes()
    try:
        path.write_bytes(content)
        assert any("embed_tokens" in key for key in differing_weights(host, Checkpoint.open(checkpoint)))
    finally:
        path.write_bytes(before)


def test_rows_are_widened_exactly_and_foreign_tokens_are_refused(pairs, checkpoint):
    expected = Checkpoint.open(checkpoint).read(TABLE)
    tokens = np.array([[0, 639], [5, 5]])
    for form, exact in (("fp32", True), ("bf16", False), ("fp16", False)):
        table = EmbeddingTable(pairs(form)[1])
        rows = table.rows(tokens)
        assert rows.dtype == np.float32 and rows.shape == (2, 2, CONFIG.backbone.width)
        np.testing.assert_allclose(rows, expected[tokens], rtol=0 if exact else 2**-8, atol=0 if exact else 1e-7)
        for bad in (-1, 640):
            with pytest.raises(ArgumentError, match=rf"token {bad} is outside the embedding table's 0..639"):
                table.rows(np.array([[1, bad]]))
        assert table.rows(np.zeros((1, 0), np.int32)).shape == (1, 0, CONFIG.backbone.width)
    assert table_of(pairs("fp32")[0]) is None


@pytest.mark.parametrize("name", ["nowhere", None, 7, f"{BACKBONE}norm.weight"])
def test_a_manifest_that_does_not_say_where_the_table_lies(pairs, tmp_path, name):
    _, host = pairs("fp16")
    folder = shutil.copytree(host.path, tmp_path / "bundle")
    told = json.loads((host.path / "manifest.json").read_text())
    if name is None:
        del told["weights"]["embeddings"]
    else:
        told["weights"]["embeddings"] = name
    (folder / "manifest.json").write_text(json.dumps(told))
    (folder / "manifest.sha256").unlink()
    with pytest.raises(BundleError, match="embedding"):
        Sampler(Bundle.open(folder), lambda spec: None)  # type: ignore[arg-type, return-value]


def test_an_option_that_does_not_exist():
    with pytest.raises(ArgumentError, match="embeddings 'device': expected one of graph, host"):
        ExportOptions(embeddings="device")
