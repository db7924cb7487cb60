"""A checkpoint's geometry: from its tensors' shapes, and what shapes cannot tell from config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ki_edge.config import GemmaConfig, Pi05Config, VisionConfig
from ki_edge.errors import CheckpointError

from .keys import BACKBONE, EMBEDDING, EXPERT, VISION, is_pi0, is_pi05
from .source import StoredTensor, TensorSource

HEAD_DIMS = {2048: 256, 1024: 256, 64: 16}  # width of gemma_2b, gemma_300m, dummy -> head_dim
VISION_HEADS = 16  # of SigLIP so400m
GEOMETRY = "head_sizes"  # block of config.json that says what shapes cannot: the split into heads
EARLIER = "tiny"  # its name in checkpoints of earlier versions
HORIZONS = ("action_horizon", "chunk_size")  # openpi, LeRobot


def read_geometry(source: TensorSource, settings: Mapping[str, Any], horizon: int) -> Pi05Config:
    """The configuration of the model that a source holds. CheckpointError, which does not name the folder."""
    tensors, given = source.tensors, settings.get(GEOMETRY) or settings.get(EARLIER) or source.geometry
    variant = _variant(tensors)
    try:
        patch = _shape(tensors, VISION + "embeddings.patch_embedding.weight")
        patches = _shape(tensors, VISION + "embeddings.position_embedding.weight")[0]
        width = _shape(tensors, "action_in_proj.weight")[1]
        state = _shape(tensors, "state_proj.weight")[1] if variant == "pi0" else width
        return Pi05Config(
            vision=VisionConfig(
                width=patch[0],
                depth=_depth(tensors, VISION + "encoder."),
                mlp_dim=_shape(tensors, VISION + "encoder.layers.0.mlp.fc1.weight")[0],
                num_heads=int(given["vision"]["num_attention_heads"]) if given else VISION_HEADS,
                patch_size=patch[2],
                image_size=round(patches**0.5) * patch[2],
            ),
            backbone=_gemma(tensors, BACKBONE, given.get("paligemma")),
            expert=_gemma(tensors, EXPERT, given.get("action_expert")),
            vocab_size=_shape(tensors, EMBEDDING)[0],
            action_dim=width,
            action_horizon=horizon,
            variant=variant,
            state_width=None if state == width else state,
        )
    except CheckpointError:
        raise
    except (KeyError, TypeError, IndexError, ValueError, ZeroDivisionError, AttributeError) as error:
        raise CheckpointError(f"no geometry in its tensors and config.json: {error!r}") from None


def read_horizon(settings: Mapping[str, Any]) -> int | None:
    """Actions of a chunk as config.json records them; None if it does not. CheckpointError for what is no number."""
    for name in HORIZONS:
        value = settings.get(name)
        if type(value) is int and value >= 1:
            return value
        if value is not None:
            raise CheckpointError(f"config.json: '{name}' is {value!r}, expected a positive integer")
    return None


def _variant(tensors: Mapping[str, StoredTensor]) -> Any:
    if is_pi0(tensors):
        return "pi0"
    if is_pi05(tensors) and "time_mlp_in.weight" in tensors:
        return "pi05"
    raise CheckpointError(
        f"neither 'time_mlp_in.weight' (π0.5) nor 'action_time_mlp_in.weight' and 'state_proj.weight' (π0) in it, but "
        f"keys such as {sorted(tensors)[:2]}"
    )


def _shape(tensors: Mapping[str, StoredTensor], key: str) -> tuple[int, ...]:
    if key not in tensors:
        raise CheckpointError(f"key '{key}' is missing")
    return tensors[key].shape


def _depth(tensors: Mapping[str, StoredTensor], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"layers\.(\d+)\.")
    return len({m[1] for key in tensors if (m := pattern.match(key))})


def _gemma(tensors: Mapping[str, StoredTensor], prefix: str, given: Mapping[str, Any] | None) -> GemmaConfig:
    attention = prefix + "layers.0.self_attn."
    width = _shape(tensors, attention + "o_proj.weight")[0]
    q_rows, kv_rows = (_shape(tensors, attention + name)[0] for name in ("q_proj.weight", "k_proj.weight"))
    head_dim = int(given["head_dim"]) if given else HEAD_DIMS.get(width, kv_rows)
    return GemmaConfig(
        width=width,
        depth=_depth(tensors, prefix),
        mlp_dim=_shape(tensors, prefix + "layers.0.mlp.gate_proj.weight")[0],
        num_heads=q_rows // head_dim,
        num_kv_heads=kv_rows // head_dim,
        head_dim=head_dim,
    )
