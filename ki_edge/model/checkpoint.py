"""The model from a checkpoint of any format, and a checkpoint from the model, in openpi's PyTorch layout."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ki_edge.checkpoints import Checkpoint
from ki_edge.checkpoints.layout.geometry import GEOMETRY
from ki_edge.checkpoints.layout.keys import EMBEDDING, EXPERT_HEAD, LM_HEAD, checkpoint_key
from ki_edge.config import GemmaConfig, Pi05Config
from ki_edge.errors import CheckpointError
from ki_edge.files.writing import write_file, writing

from .build import build
from .pi import PiModel

# kept in float32 when the rest is bfloat16 (openpi gemma_pytorch.py, to_bfloat16_for_selected_params)
FLOAT32 = re.compile(
    r"patch_embedding|position_embedding|\.(input|post_attention)_layernorm|^(backbone|expert)\.norm|^(action|time|state)_"
)

# openpi's names of Gemma's sizes (openpi gemma.py, get_config); its own reader knows no others
OPENPI_VARIANTS = {
    "gemma_2b": GemmaConfig(width=2048, depth=18, mlp_dim=16384, num_heads=8, num_kv_heads=1, head_dim=256),
    "gemma_300m": GemmaConfig(width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256),
    "dummy": GemmaConfig(width=64, depth=4, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=16),
}


def load_model(checkpoint: Checkpoint | str | Path, *, dtype: torch.dtype | None = None) -> PiModel:
    """The model with the weights of a checkpoint, opened or a folder of any format, eval mode.

    float32 unless `dtype` says otherwise; with bfloat16 the list of float32 parameters is openpi's. CheckpointError if
    it cannot be read.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint.open(checkpoint)
    with torch.device("meta"):
        model = build(checkpoint.config)
    state = {}
    for name in model.state_dict():
        wanted = torch.float32 if dtype is None or FLOAT32.search(name) else dtype
        state[name] = torch.from_numpy(checkpoint.read(name)).to(wanted)
    model.load_state_dict(state, assign=True)
    return model.eval()


def save_checkpoint(model: PiModel, folder: str | Path, *, max_token_len: int = 200) -> None:
    """Write model.safetensors and config.json in openpi's layout, float32.

    As in openpi's files the tied embedding is stored as lm_head alone, and the action expert has an lm_head that nobody
    uses (zeros here). Each file replaces its old one at once.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {checkpoint_key(name): value.detach().float().contiguous() for name, value in model.state_dict().items()}
    state[LM_HEAD] = state.pop(EMBEDDING)
    state[EXPERT_HEAD] = torch.zeros(model.config.vocab_size, model.config.expert.width)
    write_safetensors(state, folder / "model.safetensors", {EMBEDDING: LM_HEAD, "format": "pt"})
    config = model.config
    settings = {
        "action_dim": config.action_dim,
        "action_horizon": config.action_horizon,
        **_variants(config),
        "precision": "float32",
        "pi05": config.variant == "pi05",
        "max_token_len": max_token_len,
        GEOMETRY: {
            "vision": {"num_attention_heads": config.vision.num_heads},
            "paligemma": {"head_dim": config.backbone.head_dim},
            "action_expert": {"head_dim": config.expert.head_dim},
        },
    }
    write_file(folder / "config.json", json.dumps(settings, indent=1) + "\n", CheckpointError)


def write_safetensors(state: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Replace a file of tensors at once, or not at all. CheckpointError names it if it cannot be written."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writing(path, CheckpointError):
            tensors = {name: tensor.contiguous() for name, tensor in state.items()}
            save_file(tensors, partial, metadata=dict(metadata))
            partial.chmod(0o644)  # the library makes it private
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
    except SafetensorError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _variants(config: Pi05Config) -> dict[str, str]:
    """openpi's names of the two Gemmas, where it has names for both; other sizes are told by the geometry block."""
    parts = {"paligemma_variant": config.backbone, "action_expert_variant": config.expert}
    found = {key: name for key, part in parts.items() for name, size in OPENPI_VARIANTS.items() if size == part}
    return found if len(found) == len(parts) else {}
