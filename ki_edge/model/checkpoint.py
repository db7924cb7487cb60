"""Checkpoint folders in openpi's or LeRobot's layout: keys, geometry, dtypes, reading and writing.

The two layouts differ in a `model.` prefix; both may store the tied embedding once (as lm_head) or twice, and then
embed_tokens is the one that was trained. Facts: openpi models_pytorch/pi0_pytorch.py, LeRobot policies/pi05.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..config import GemmaConfig, Pi05Config, VisionConfig
from ..errors import CheckpointError
from ..safetensors_index import SafetensorsIndex, TensorEntry
from .pi05 import Pi05

PALIGEMMA = "paligemma_with_expert.paligemma."
EMBEDDING = PALIGEMMA + "model.language_model.embed_tokens.weight"
LM_HEAD = PALIGEMMA + "lm_head.weight"
EXPERT_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"
# our module prefix -> the checkpoint's; everything after it is spelled the same
PREFIXES = {
    "vision.": PALIGEMMA + "model.vision_tower.vision_model.",
    "projector.": PALIGEMMA + "model.multi_modal_projector.linear.",
    "backbone.": PALIGEMMA + "model.language_model.",
    "expert.": "paligemma_with_expert.gemma_expert.model.",
}
UNUSED = (LM_HEAD, EXPERT_HEAD)
HEAD_DIMS = {2048: 256, 1024: 256, 64: 16}  # backbone width of gemma_2b, gemma_300m, dummy -> head_dim
MAX_CONFIG = 4_000_000
GEOMETRY = "tiny"  # block of config.json that says what shapes cannot: the split into heads
# kept in float32 when the rest is bfloat16 (openpi gemma_pytorch.py, to_bfloat16_for_selected_params)
FLOAT32 = re.compile(
    r"patch_embedding|position_embedding|\.(input|post_attention)_layernorm|^(backbone|expert)\.norm|^(action|time)_"
)


def checkpoint_key(name: str) -> str:
    """The checkpoint's key for one of the model's parameter names."""
    for ours, theirs in PREFIXES.items():
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder. `keys` maps openpi's key to the name stored in the file."""

    path: Path
    index: SafetensorsIndex
    keys: Mapping[str, str]
    layout: str  # "openpi" or "lerobot"
    settings: Mapping[str, Any]  # config.json
    config: Pi05Config

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read headers and geometry of a folder with model.safetensors and, if need be, config.json.

        CheckpointError names what is missing, truncated, foreign, or of a wrong shape. No tensor is loaded.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise CheckpointError(f"no checkpoint folder at {folder}: expected a folder with model.safetensors")
        index = SafetensorsIndex(folder / "model.safetensors")
        settings = _read_settings(folder / "config.json")
        lerobot = any(name.startswith("model.") for name in index.entries)
        keys = {name.removeprefix("model."): name for name in index.entries}
        if EMBEDDING not in keys and LM_HEAD in keys:
            keys[EMBEDDING] = keys[LM_HEAD]
        if "time_mlp_in.weight" not in keys:
            found = "a π0 checkpoint" if "state_proj.weight" in keys else f"keys such as {sorted(keys)[:2]}"
            raise CheckpointError(f"{index.path}: no 'time_mlp_in.weight', so this is no π0.5 checkpoint but {found}")
        config = _geometry(index, keys, settings)
        _check_tensors(index, keys, config)
        return cls(folder, index, keys, "lerobot" if lerobot else "openpi", settings, config)

    def entry(self, key: str) -> TensorEntry:
        """Where openpi's `key` lies in the file."""
        return self.index.entries[self.keys[key]]

    def load_model(self, *, dtype: torch.dtype = torch.float32) -> Pi05:
        """The model with this checkpoint's weights, eval mode, no gradients recorded by default samplers.

        With bfloat16 the list of float32 parameters is openpi's.
        """
        with torch.device("meta"):
            model = Pi05(self.config)
        state = {name: self._tensor(name, dtype) for name in model.state_dict()}
        model.load_state_dict(state, assign=True)
        return model.eval()

    @property
    def time_convention(self) -> str:
        """How the reference that wrote this layout computes denoising times."""
        return self.layout

    def _tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        array = self.index.array(self.keys[checkpoint_key(name)])
        wanted = torch.float32 if FLOAT32.search(name) else dtype
        return torch.from_numpy(array.copy()).to(wanted)


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    if path.stat().st_size > MAX_CONFIG:
        raise CheckpointError(f"{path}: {path.stat().st_size} bytes, more than a configuration can be ({MAX_CONFIG})")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return settings


def _geometry(index: SafetensorsIndex, keys: Mapping[str, str], settings: Mapping[str, Any]) -> Pi05Config:
    def shape(key: str) -> tuple[int, ...]:
        if key not in keys:
            raise CheckpointError(f"key '{key}' is missing")
        return index.entries[keys[key]].shape

    def depth(prefix: str) -> int:
        pattern = re.compile(re.escape(prefix) + r"layers\.(\d+)\.")
        return len({m[1] for key in keys if (m := pattern.match(key))})

    given = settings.get(GEOMETRY, {}) or {}
    vision = PREFIXES["vision."]
    try:
        patch = shape(vision + "embeddings.patch_embedding.weight")
        patches = shape(vision + "embeddings.position_embedding.weight")[0]
        return Pi05Config(
            vision=VisionConfig(
                width=patch[0],
                depth=depth(vision + "encoder."),
                mlp_dim=shape(vision + "encoder.layers.0.mlp.fc1.weight")[0],
                num_heads=int(given["vision"]["num_attention_heads"]) if given else 16,
                patch_size=patch[2],
                image_size=round(patches**0.5) * patch[2],
            ),
            backbone=_gemma(PREFIXES["backbone."], shape, depth, given.get("paligemma")),
            expert=_gemma(PREFIXES["expert."], shape, depth, given.get("action_expert")),
            vocab_size=shape(EMBEDDING)[0],
            action_dim=shape("action_in_proj.weight")[1],
            action_horizon=_horizon(settings),
        )
    except CheckpointError as error:
        raise CheckpointError(f"{index.path.parent}: {error}") from None
    except (KeyError, TypeError, IndexError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{index.path}: no geometry in its tensors and config.json: {error!r}") from None


def _horizon(settings: Mapping[str, Any]) -> int:
    for name in ("action_horizon", "chunk_size"):
        value = settings.get(name)
        if type(value) is int and value >= 1:
            return value
        if value is not None:
            raise CheckpointError(f"config.json: '{name}' is {value!r}, expected a positive integer")
    raise CheckpointError("config.json: neither 'action_horizon' nor 'chunk_size' in it: add the actions of a chunk")


def _gemma(prefix: str, shape: Any, depth: Any, given: Mapping[str, Any] | None) -> GemmaConfig:
    width = shape(prefix + "layers.0.self_attn.o_proj.weight")[0]
    q_rows = shape(prefix + "layers.0.self_attn.q_proj.weight")[0]
    kv_rows = shape(prefix + "layers.0.self_attn.k_proj.weight")[0]
    head_dim = int(given["head_dim"]) if given else HEAD_DIMS.get(width, kv_rows)
    return GemmaConfig(
        width=width,
        depth=depth(prefix),
        mlp_dim=shape(prefix + "layers.0.mlp.gate_proj.weight")[0],
        num_heads=q_rows // head_dim,
        num_kv_heads=kv_rows // head_dim,
        head_dim=head_dim,
    )


def _check_tensors(index: SafetensorsIndex, keys: Mapping[str, str], config: Pi05Config) -> None:
    with torch.device("meta"):
        expected = {checkpoint_key(name): tuple(t.shape) for name, t in Pi05(config).state_dict().items()}
    missing = sorted(set(expected) - set(keys))
    unknown = sorted(set(keys) - set(expected) - set(UNUSED))
    if missing or unknown:
        what = f"key '{missing[0]}' is missing" if missing else f"unexpected key '{unknown[0]}'"
        raise CheckpointError(
            f"{index.path}: {what} ({len(missing)} missing, {len(unknown)} unexpected of {len(expected)})"
        )
    for key, shape in expected.items():
        entry = index.entries[keys[key]]
        if entry.shape != shape:
            raise CheckpointError(f"{index.path}: '{key}' has shape {list(entry.shape)}, expected {list(shape)}")
        if entry.dtype not in ("F32", "BF16", "F16"):
            raise CheckpointError(f"{index.path}: '{key}' has dtype {entry.dtype}, expected F32, BF16 or F16")


def save_checkpoint(model: Pi05, folder: str | Path, *, max_token_len: int = 200) -> None:
    """Write model.safetensors and config.json in openpi's layout, float32.

    As in openpi's files the tied embedding is stored as lm_head alone, and the action expert has an lm_head that nobody
    uses (zeros here). Each file replaces its old one at once.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {checkpoint_key(name): value.detach().float().contiguous() for name, value in model.state_dict().items()}
    state[LM_HEAD] = state.pop(EMBEDDING)
    state[EXPERT_HEAD] = torch.zeros(model.config.vocab_size, model.config.expert.width)
    save_file(state, folder / "model.partial", metadata={EMBEDDING: LM_HEAD, "format": "pt"})
    (folder / "model.partial").chmod(0o644)  # the library makes it private
    (folder / "model.partial").replace(folder / "model.safetensors")
    config = model.config
    settings = {
        "action_dim": config.action_dim,
        "action_horizon": config.action_horizon,
        "paligemma_variant": "tiny",
        "action_expert_variant": "tiny",
        "precision": "float32",
        "pi05": True,
        "max_token_len": max_token_len,
        GEOMETRY: {
            "vision": {"num_attention_heads": config.vision.num_heads},
            "paligemma": {"head_dim": config.backbone.head_dim},
            "action_expert": {"head_dim": config.expert.head_dim},
        },
    }
    (folder / "config.partial").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    (folder / "config.partial").replace(folder / "config.json")
