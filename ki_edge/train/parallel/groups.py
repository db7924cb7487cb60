"""Groups of a model's parameters that are frozen, adapted, or learn at rates of their own."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ki_edge.errors import ArgumentError
from ki_edge.model import Pi05
from ki_edge.planning.settings import BACKBONE_SIDE, GROUPS

EMBEDDINGS = "backbone.embed_tokens."


def group_of(name: str) -> str:
    """The group of a parameter, by its name in the model; whatever is not the backbone's side is the expert's."""
    if name.startswith(EMBEDDINGS):
        return "embeddings"
    first = name.partition(".")[0]
    return first if first in GROUPS else "expert"


def freeze(model: Pi05, groups: Iterable[str]) -> None:
    """Let these groups stay as they are. ArgumentError if nothing is left to learn."""
    frozen = set(groups)
    for name, parameter in model.named_parameters():
        if group_of(name) in frozen:
            parameter.requires_grad_(False)
    check_learns(model)


def freeze_unused(model: Pi05, *, tokens: bool) -> None:
    """Let parameters stay that no loss term reaches: without token terms those behind the last layer's K/V, and all of
    an insulated backbone.

    They would have no gradient in any step; a process must know that beforehand, not wait for one.
    """
    if tokens:
        return
    last = f"backbone.layers.{len(model.backbone.stack) - 1}."
    behind = (f"{last}self_attn.q_proj", f"{last}self_attn.o_proj", f"{last}post_attention_layernorm", f"{last}mlp")
    for name, parameter in model.named_parameters():
        insulated = model.knowledge_insulation and group_of(name) in BACKBONE_SIDE
        if insulated or name.startswith((*behind, "backbone.norm.")):
            parameter.requires_grad_(False)
    check_learns(model)


def check_learns(model: nn.Module) -> None:
    """ArgumentError for a model whose every parameter is frozen."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ArgumentError("everything is frozen: nothing is left to learn")
