"""Small checkpoints, and exports of them."""

import fcntl
import hashlib
import shutil
from importlib.metadata import version as version_of
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

import ki_edge.model
import ki_export.graphs.tracing
import ki_export.passes
from ki_edge.bundle import Bundle, DecodeVocabulary
from ki_edge.config import GemmaConfig, Pi05Config, VisionConfig
from ki_edge.model import build, save_checkpoint
from ki_edge.policy.contract import FastContract, generic
from ki_edge.policy.fast_fitting import fit_codec
from ki_edge.policy.normalize import NormStats, write_norm_stats
from ki_export.exporter import export
from ki_export.options import ExportOptions

CONFIG = Pi05Config(
    vision=VisionConfig(width=16, depth=1, mlp_dim=24, num_heads=2, patch_size=7, image_size=14),
    backbone=GemmaConfig(width=24, depth=2, mlp_dim=40, num_heads=2, num_kv_heads=1, head_dim=8),
    expert=GemmaConfig(width=16, depth=2, mlp_dim=24, num_heads=2, num_kv_heads=1, head_dim=8),
    vocab_size=640,
    action_dim=6,
    action_horizon=5,
)
OFFSET = 600  # id of FAST token 0
OPENPI_KEYS = SimpleNamespace(
    embedding="paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight",
    lm_head="paligemma_with_expert.paligemma.lm_head.weight",
    backbone="paligemma_with_expert.paligemma.model.language_model.",
    expert="paligemma_with_expert.gemma_expert.model.",
)


@pytest.fixture(scope="session", autouse=True)
def traced_once(request, made_once):
    """Tracing is slow, so each graph is traced once, and again only after a change of anything that shapes it."""
    trace, cache = ki_export.graphs.tracing.trace, getattr(request.config, "cache", None)
    folder = cache.mkdir("ki_export_traces") if cache else made_once("traces", Path.mkdir)
    version = hashlib.sha256(
        repr((torch.__version__, onnx.__version__, version_of("onnxscript"), version_of("onnx-ir"))).encode()
    )
    for package in (ki_edge.model, ki_export.passes, ki_export.graphs):
        for file in sorted(Path(package.__file__).parent.glob("*.py")):
            version.update(file.read_bytes())

    def remembered(traceable, opset, sizes):
        tensors = (*traceable.spec.inputs, *traceable.spec.outputs)
        shapes = [(t.name, t.dtype, t.resolve(sizes)) for t in tensors]
        key = repr((traceable.module.model.config, traceable.depths, shapes, opset, traceable.module))
        path = folder / (hashlib.sha256(version.digest() + key.encode()).hexdigest()[:32] + ".onnx")
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                partial = path.with_suffix(".partial")
                partial.write_bytes(ki_export.graphs.tracing.pack(trace(traceable, opset, sizes)))
                partial.replace(path)
        return ki_export.graphs.tracing.unpack(path.read_bytes())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ki_export.graphs.tracing, "trace", remembered)
        yield


def random_model(seed=0, config=CONFIG):
    """A model whose every parameter matters."""
    torch.manual_seed(seed)
    model = build(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1))
        model.backbone.embed_tokens.weight.mul_(0.3)  # else every token predicts itself
    return model


@pytest.fixture(scope="session")
def small_model():
    """Makes one: `small_model(seed=0)`."""
    return random_model


@pytest.fixture
def traced():
    """Fresh float32 graphs of the small model, by name."""
    return ki_export.graphs.tracing.trace_all(CONFIG, DecodeVocabulary(0, CONFIG.vocab_size), 20)


def save_policy(folder, tokenizer_model):
    """A policy checkpoint as ki-train writes it."""
    save_checkpoint(random_model(), folder, max_token_len=20)
    codec = fit_codec(np.random.default_rng(0).uniform(-1, 1, (20, 5, 2)), vocab_size=60, margin=2)
    codec.save(folder / "assets" / "fast")
    (folder / "assets" / "tokenizer.model").write_bytes(tokenizer_model)
    stats = NormStats(q01=[-1.0, 0.0], q99=[1.0, 3.0])
    write_norm_stats(folder / "assets" / "norm_stats.json", {"state": stats, "actions": stats})
    fields = {"state_dim": 2, "action_dim": 2, "action_horizon": 5, "model_action_dim": 6, "max_token_len": 20}
    fast = FastContract(id_offset=OFFSET, size=codec.vocab_size, max_tokens=60)
    contract = generic(["left", "right"], **fields, image_size=(14, 14), prompt_format="ki", fast=fast, num_steps=4)
    contract.save(folder / "contract.json")


@pytest.fixture(scope="session")
def checkpoint(made_once, tokenizer_model):
    """That policy. Do not change it: copy it."""
    return made_once("checkpoint", lambda folder: save_policy(folder, tokenizer_model))


@pytest.fixture(scope="session")
def bundle(checkpoint, made_once):
    """The exported, proven policy."""
    return Bundle.open(made_once("bundle", lambda path: export(checkpoint, path, ExportOptions())))


@pytest.fixture
def copied(checkpoint, tmp_path):
    """A checkpoint of one's own to damage."""
    return shutil.copytree(checkpoint, tmp_path / "checkpoint")
