"""LoRA through PEFT: low-rank adapters instead of a group's own matrices, and the folder that PEFT and ki-export read.

An adapter's scale is 1 (alpha is the rank). The names in its folder are openpi's. What learns in full beside it is in
the folder too, as PEFT's `modules_to_save` are, so that base and folder are the whole result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ki_edge.checkpoints.layout.keys import checkpoint_key
from ki_edge.checkpoints.peft.adapter import CONFIG, WEIGHTS
from ki_edge.checkpoints.peft.lora import PREFIX, LowRank
from ki_edge.errors import ArgumentError, CheckpointError
from ki_edge.files.writing import write_file
from ki_edge.model import Pi05
from ki_edge.model.checkpoint import write_tensors

from .groups import group_of
from .processes import Processes
from .sharding import first_row, local

NAME = "default"  # of PEFT's adapter
PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


def plain_name(name: str) -> str:
    """A parameter's name in a model without adapters."""
    return name.replace(".base_layer.", ".")


def module_of(name: str) -> tuple[str, str] | None:
    """The module and the part (`lora_A`, ...) that an adapter's parameter belongs to; None for the model's own."""
    words = name.split(".")
    for at, word in enumerate(words):
        if word in PARTS:
            return ".".join(words[:at]), word
    return None


def install(model: Pi05, ranks: Mapping[str, int]) -> None:
    """Put adapters of these ranks beside the matrices of groups, whose own parameters stay as they are.

    Of the expert, its transformer: projections of actions and time are small and learn in full. Adapters change nothing
    before the first step. ArgumentError without PEFT.
    """
    targets = {name: ranks[group] for name, group in _matrices(model).items() if group in ranks}
    if not targets:
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ArgumentError("lora: needs PEFT: pip install 'ki-edge[lora]'") from None
    rank = max(targets.values())
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=sorted(targets), lora_dropout=0.0, bias="none",
        rank_pattern=dict(targets), alpha_pattern=dict(targets),
    )  # fmt: skip
    inject_adapter_in_model(config, cast(Any, model), adapter_name=NAME)
    for name, parameter in model.named_parameters():
        own = module_of(name) is None
        inside = group_of(name) in ranks and (group_of(name) != "expert" or name.startswith("expert."))
        parameter.requires_grad_(not (own and inside))
    if "embeddings" in ranks:
        model.backbone.adapter = _Table(model.backbone.embed_tokens)


@torch.no_grad()
def start(model: nn.Module, processes: Processes, seed: int) -> None:
    """Give adapters their first values, the same ones however they are spread over processes."""
    for name, parameter in model.named_parameters():
        if module_of(name) is not None:
            target, first = local(parameter), first_row(parameter, processes)
            values = first_values(name, tuple(parameter.shape), seed)
            target.copy_(torch.from_numpy(values[first : first + len(target)]))


def first_values(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """An adapter's parameter at the start: the second factor is zero, the first uniform as in a new linear layer."""
    found = module_of(name)
    assert found is not None
    if found[1] in ("lora_B", "lora_embedding_A"):
        return np.zeros(shape, np.float32)
    rng = np.random.default_rng([seed, *name.encode()])
    bound = 1.0 / math.sqrt(shape[1] if found[1] == "lora_A" else shape[0])
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def merged(base: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """A matrix with its adapter, f32 on the CPU, as ki-export merges the adapter's folder."""
    arrays = {part: value.float().numpy() for part, value in parts.items()}
    if "lora_A" in arrays:
        low_rank = LowRank(arrays["lora_B"], arrays["lora_A"], 1.0)
    else:
        low_rank = LowRank(arrays["lora_embedding_A"].T, arrays["lora_embedding_B"].T, 1.0)
    return torch.from_numpy(low_rank.added_to(base.float().numpy(), 0, len(base)))


def _matrices(model: Pi05) -> dict[str, str]:
    """Modules that can have an adapter, and their groups."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or name == "backbone.embed_tokens":
            group = group_of(name + ".")
            if group != "expert" or name.startswith("expert."):
                found[name] = group
    return found


class _Table:
    """What an adapter of the embedding adds where its table is used as the output layer."""

    def __init__(self, embedding: Any) -> None:
        self._embedding = embedding

    def _factors(self) -> tuple[Tensor, Tensor]:
        return self._embedding.lora_embedding_A[NAME], self._embedding.lora_embedding_B[NAME]  # [r,V], [W,r]

    def logits(self, hidden: Tensor) -> Tensor:
        first, second = self._factors()
        return ((hidden @ second) @ first).float()

    def rows(self, tokens: Tensor) -> Tensor:
        first, second = self._factors()
        return first[:, tokens].T @ second.T


def save_adapter(
    folder: Path, tensors: Iterator[tuple[str, Tensor]], shapes: Mapping[str, tuple[int, ...]], base: str | None
) -> None:
    """Write a PEFT folder. `tensors`: what learnt, by the model's names, each of `shapes` once; f32 on the CPU.

    `base`: what adapter_config.json names as the base. CheckpointError if it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranks = {_module_key(found[0]): shape[0] for name, shape in shapes.items()
             if (found := module_of(name)) and found[1] in ("lora_A", "lora_embedding_A")}  # fmt: skip
    full = sorted({checkpoint_key(name).rpartition(".")[0] for name in shapes if module_of(name) is None})
    rank = max(ranks.values())
    settings = {
        "peft_type": "LORA", "base_model_name_or_path": base, "r": rank, "lora_alpha": rank, "bias": "none",
        "lora_dropout": 0.0, "target_modules": sorted(ranks), "modules_to_save": full or None, "inference_mode": True,
        "init_lora_weights": True, "use_dora": False, "use_rslora": False, "fan_in_fan_out": False,
        "rank_pattern": {name: own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {name: own for name, own in ranks.items() if own != rank},
        "task_type": None, "auto_mapping": None, "revision": None,
    }  # fmt: skip
    stored = {_stored_name(name): shape for name, shape in shapes.items()}
    write_tensors(folder / WEIGHTS, stored, ((_stored_name(name), value) for name, value in tensors), {"format": "pt"})
    write_file(folder / CONFIG, json.dumps(settings, indent=1) + "\n", CheckpointError)


def _module_key(module: str) -> str:
    return checkpoint_key(module + ".weight").removesuffix(".weight")


def _stored_name(name: str) -> str:
    found = module_of(name)
    if found is None:
        return PREFIX + checkpoint_key(plain_name(name))
    module, part = found
    return f"{PREFIX}{_module_key(module)}.{part}" + ("" if part.startswith("lora_embedding") else ".weight")
