"""adapter_config.json of a PEFT folder: what was trained, on which base, at which scale.

Facts: peft 0.21, tuners/lora/config.py, model.py (`_create_and_replace`) and layer.py (`update_layer`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ki_edge.checkpoints.layout.formats import WEIGHTS as MODEL
from ki_edge.checkpoints.layout.formats import read_json
from ki_edge.errors import CheckpointError
from ki_edge.files.hub import Resolved, Say, resolve

from .name_patterns import NamePattern, PatternError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_PATTERNS = 2000  # of ranks or alphas: one for each layer is a few hundred
MAX_STATES = 4000  # of all patterns that are no plain names
PLAIN = re.compile(r"[\w.-]+", re.ASCII)
# settings that a merge does not depend on, or that are read below
HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "init_weights",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout",
    "lora_ga_config", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")  # they leave the base's weights as they were
REASONS = {
    "alora_invocation_tokens": "it acts on some tokens only, so no merged weight exists",
    "arrow_config": "it chooses among adapters for each token, so no merged weight exists",
    "kasa_config": "it changes the base's weights",
    "layer_replication": "it repeats layers of the base",
    "megatron_config": "its layers are Megatron's",
    "target_parameters": "it trains parameters that the policy does not have",
    "trainable_token_indices": "it trains single rows of the embedding",
    "use_qalora": "it pools the inputs of quantised layers",
}


@dataclass(frozen=True)
class AdapterConfig:
    """A LoRA's settings. `ranks` and `alphas`: regular expressions of module names -> exceptions from `r`, `alpha`."""

    path: Path
    base: str | None
    revision: str | None
    r: int
    alpha: float
    rank_stabilised: bool
    dora: bool
    bias: str
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    @classmethod
    def read(cls, folder: Path) -> AdapterConfig:
        """CheckpointError for a file that is damaged, of another method than LoRA, or that cannot be merged exactly."""
        path = folder / CONFIG
        settings = read_json(path)
        _refuse(path, settings)
        revision = settings.get("revision")
        return cls(
            path=path,
            base=_base(settings),
            revision=revision if isinstance(revision, str) and revision else None,
            r=int(_positive(path, "r", settings.get("r"), int)),
            alpha=_positive(path, "lora_alpha", settings.get("lora_alpha")),
            rank_stabilised=settings.get("use_rslora") is True,
            dora=settings.get("use_dora") is True,
            bias=str(settings.get("bias") or "none"),
            ranks={key: int(value) for key, value in _patterns(path, settings, "rank_pattern", int).items()},
            alphas=_patterns(path, settings, "alpha_pattern"),
        )

    def rank(self, module: str) -> int:
        """Rank of a module, named as in the model that was trained."""
        return self.ranks.get(_match(self.ranks, module), self.r)

    def scale(self, module: str) -> float:
        """Factor of B @ A: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv 2312.03732)."""
        rank, alpha = self.rank(module), self.alphas.get(_match(self.alphas, module), self.alpha)
        return alpha / math.sqrt(rank) if self.rank_stabilised else alpha / rank


def is_adapter(folder: str | Path) -> bool:
    """A folder that PEFT wrote: an adapter, to be merged into its base."""
    return (Path(folder) / CONFIG).is_file()


def find_base(folder: str | Path) -> str:
    """Hub id or folder of the model that the adapter was trained on, as recorded. CheckpointError if it is not."""
    path = Path(folder) / CONFIG
    base = _base(read_json(path))
    if base is None:
        raise CheckpointError(
            f"{path} does not record 'base_model_name_or_path': give the base with --base DIR_OR_HUB_ID"
        )
    return base


def find_base_revision(folder: str | Path) -> str | None:
    """Revision of the base as recorded, a branch, tag or commit; None if any will do."""
    revision = read_json(Path(folder) / CONFIG).get("revision")
    return revision if isinstance(revision, str) and revision else None


def resolve_base(folder: str | Path, given: str | Path | None = None, *, say: Say | None = None) -> Resolved:
    """The base of an adapter: `given`, a folder or Hub id, or else what the adapter records, fetched if need be.

    CheckpointError names the base and the flag to give it where it cannot be had.
    """
    name = str(given) if given is not None else find_base(folder)
    try:
        local = given is not None or Path(name).is_dir()
        base = resolve(name, revision=None if local else find_base_revision(folder), say=say)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} is a LoRA adapter of '{name}', which cannot be had: {error}; give it with --base DIR_OR_HUB_ID"
        ) from None
    if is_adapter(base.folder) and not (base.folder / MODEL).is_file():
        raise CheckpointError(f"{folder}: its base {base.folder} is an adapter too: merge that one with PEFT first")
    return base


def _base(settings: Mapping[str, Any]) -> str | None:
    base = settings.get("base_model_name_or_path")
    return base if isinstance(base, str) and base.strip() else None


def _refuse(path: Path, settings: Mapping[str, Any]) -> None:
    method = settings.get("peft_type")
    if method != "LORA":
        raise CheckpointError(
            f"{path}: the adapter's method is {method!r}, and only 'LORA' can be merged here: "
            "merge it with PEFT's merge_and_unload() and give the merged checkpoint"
        )
    start = settings.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise CheckpointError(
            f"{path}: init_lora_weights {start!r} changed the base's weights, which the adapter does not hold: save it "
            "with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...) or give the merged checkpoint"
        )
    for name, value in settings.items():
        if value and name not in HARMLESS:
            reason = REASONS.get(name, "what it changes in a merge is not known here")
            raise CheckpointError(
                f"{path}: this LoRA uses '{name}' ({reason}): merge it with PEFT and give the merged checkpoint"
            )


def _positive(path: Path, name: str, value: Any, *kinds: type) -> float:
    if type(value) not in (kinds or (int, float)) or not 0 < value < math.inf:
        raise CheckpointError(f"{path}: '{name}' is {value!r}, expected a positive number")
    return float(value)


def _patterns(path: Path, settings: Mapping[str, Any], name: str, *kinds: type) -> dict[str, float]:
    patterns = settings.get(name) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{path}: '{name}' must be an object, found {type(patterns).__name__}")
    if len(patterns) > MAX_PATTERNS:
        raise CheckpointError(f"{path}: '{name}' has {len(patterns)} patterns, at most {MAX_PATTERNS} are read")
    states = 0
    for pattern in patterns:
        try:
            found = _compiled(pattern)
        except PatternError as error:
            raise CheckpointError(f"{path}: '{name}' has the pattern {pattern[:80]!r}: {error}") from None
        states += 0 if PLAIN.fullmatch(pattern) else found.states
        if states > MAX_STATES:
            raise CheckpointError(f"{path}: the patterns of '{name}' are too large together: merge it with PEFT")
    return {pattern: _positive(path, f"{name} of {pattern}", value, *kinds) for pattern, value in patterns.items()}


def _match(patterns: Mapping[str, float], module: str) -> str:
    """The first pattern that is a module's name, or the end of it after a dot."""
    return next((pattern for pattern in patterns if _ends(pattern, module)), module)


def _ends(pattern: str, module: str) -> bool:
    if PLAIN.fullmatch(pattern):  # a name, as PEFT itself writes them; its dots stand for any character
        length = len(pattern)
        same = all(theirs in (".", ours) for ours, theirs in zip(module[-length:], pattern, strict=False))
        return same and len(module) >= length and module[-length - 1 : -length] in ("", ".")
    return _compiled(pattern).ends(module)


@lru_cache(maxsize=MAX_PATTERNS)
def _compiled(pattern: str) -> NamePattern:
    return NamePattern(pattern)
