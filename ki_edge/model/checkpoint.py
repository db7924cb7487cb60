"""The model from a checkpoint of any format, and a checkpoint from the model, in openpi's PyTorch layout."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from ki_edge.checkpoints import Checkpoint
from ki_edge.checkpoints.layout.geometry import GEOMETRY
from ki_edge.checkpoints.layout.keys import EMBEDDING, EXPERT_HEAD, LM_HEAD, checkpoint_key, parameter_shapes
from ki_edge.config import GemmaConfig, Pi05Config
from ki_edge.errors import CheckpointError
from ki_edge.files.writing import write_file, writing

from .build import build
from .pi import PiModel

# kept in float32 when the rest is bfloat16 (openpi gemma_pytorch.py, to_bfloat16_for_selected_params)
FLOAT32 = re.compile(
    r"patch_embedding|position_embedding|\.(input|post_attention)_layernorm|^(backbone|expert)\.norm|^(action|time|state)_"
)

PIECE = 1 << 22  # elements that are written at once

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
    uses (zeros here). Each file replaces its old one at once; CheckpointError if it cannot be written.
    """
    write_checkpoint(model.config, model.state_dict().items(), folder, max_token_len=max_token_len)


def write_checkpoint(
    config: Pi05Config, tensors: Iterable[tuple[str, torch.Tensor]], folder: str | Path, *, max_token_len: int = 200
) -> None:
    """`save_checkpoint` of weights that come one after the other, by the model's parameter names, in any order.

    Only one of them is held at a time. CheckpointError unless all of them come.
    """
    folder = Path(folder)
    with writing(folder, CheckpointError):
        folder.mkdir(parents=True, exist_ok=True)
    shapes = parameter_shapes(config)
    shapes[LM_HEAD] = shapes.pop(EMBEDDING)
    shapes[EXPERT_HEAD] = (config.vocab_size, config.expert.width)
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
    write_tensors(folder / "model.safetensors", shapes, _stored(tensors, config), {EMBEDDING: LM_HEAD, "format": "pt"})
    write_file(folder / "config.json", json.dumps(settings, indent=1) + "\n", CheckpointError)


def _stored(tensors: Iterable[tuple[str, torch.Tensor]], config: Pi05Config) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in tensors:
        key = checkpoint_key(name)
        yield LM_HEAD if key == EMBEDDING else key, value
    yield EXPERT_HEAD, torch.zeros(1).expand(config.vocab_size, config.expert.width)


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Replace a safetensors file of float32 tensors at once, or not at all, while they come one after the other.

    `shapes`: what the file will hold; `tensors` may come in another order, each once. CheckpointError names the file if
    it cannot be written, and what did not come, or not in its shape.
    """
    places, header = _header(shapes, metadata)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writing(path, CheckpointError), partial.open("wb") as file:
            file.write(header)
            for name, tensor in tensors:
                place = places.pop(name, None)
                if place is None or tuple(tensor.shape) != shapes[name]:
                    raise CheckpointError(f"{path}: '{name}' {list(tensor.shape)} is not one of its tensors")
                file.seek(len(header) + place)
                for piece in _pieces(tensor):
                    file.write(piece)
            if places:
                raise CheckpointError(f"{path}: there is no '{next(iter(places))}' to write")
            file.flush()
            os.fsync(file.fileno())
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _header(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> tuple[dict[str, int], bytes]:
    """Where each tensor begins behind the header, and the header (safetensors: its length u64, JSON, spaces)."""
    places, entries, end = {}, {}, 0
    for name, shape in shapes.items():
        places[name], start = end, end
        end += 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    content = json.dumps({"__metadata__": dict(metadata), **entries}).encode()
    content += b" " * (-len(content) % 8)
    return places, len(content).to_bytes(8, "little") + content


def _pieces(tensor: torch.Tensor) -> Iterator[memoryview]:
    """A tensor's bytes as float32, a few rows at a time."""
    rows = tensor.detach().reshape(-1) if tensor.ndim < 2 else tensor.detach()
    step = max(1, PIECE // max(1, rows[:1].numel()))
    for start in range(0, len(rows), step):
        yield rows[start : start + step].float().cpu().contiguous().numpy().data.cast("B")


def _variants(config: Pi05Config) -> dict[str, str]:
    """openpi's names of the two Gemmas, where it has names for both; other sizes are told by the geometry block."""
    parts = {"paligemma_variant": config.backbone, "action_expert_variant": config.expert}
    found = {key: name for key, part in parts.items() for name, size in OPENPI_VARIANTS.items() if size == part}
    return found if len(found) == len(parts) else {}
