"""openpi's JAX parameter tree as recipes for PyTorch's tensors, checked against the leaves that are there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ki_edge.errors import CheckpointError

from .names import ATTENTION, BLOCK, LAYERS, Adapter, Array, Rule, Shapes, rules

MODULES = ("PaliGemma/", "action_", "state_proj/", "time_mlp_")  # nothing under these may be left over
# rank of the attention adapters of gemma_2b_lora and gemma_300m_lora, where alpha equals it (openpi gemma.py)
LORA_RANKS = {"": 16, "_1": 32}


@dataclass(frozen=True)
class Recipe:
    """One PyTorch tensor: `convert` of leaf[index], which is contiguous in the leaf, after its adapter is added."""

    leaf: str
    index: tuple[int, ...]
    convert: Callable[[Array], Array]
    adapter: Adapter | None = None


def belongs(leaf: str) -> bool:
    """Whether a leaf is of the policy. Other modules and the states of random numbers are not: openpi drops them."""
    return leaf.startswith(MODULES) and "rngs" not in leaf.split("/")


def recipes(shapes: Shapes, folder: object) -> dict[str, Recipe]:
    """PyTorch key -> recipe for a tree of leaves (path joined with "/", shape), layer after layer.

    π0 and π0.5 are told apart by the leaves. CheckpointError for a leaf that is missing, left over, or of a wrong
    shape, and for adapters whose scale the checkpoint does not tell.
    """
    table = list(rules(shapes))
    missing = [rule.leaf for rule in table if rule.leaf not in shapes]
    if missing:
        raise CheckpointError(
            f"{folder}: parameter '{missing[0]}' is missing ({len(missing)} of {len(table)} are): "
            f"expected the parameters of openpi's π0 or π0.5{_guess(shapes)}"
        )
    used = {leaf for rule in table for leaf in _leaves(rule)}
    unknown = sorted(set(shapes) - used)
    if unknown:
        raise CheckpointError(
            f"{folder}: unexpected parameter '{unknown[0]}' ({len(unknown)} such): openpi's π0 and π0.5 do not have it"
        )
    for check in (_check_axes, _check_depth, _check_adapter):
        for rule in table:
            check(rule, shapes, folder)
    plain = {rule.key: _recipe(rule) for rule in table if not rule.stacked}
    for tower in (BLOCK, LAYERS):
        stack = [rule for rule in table if rule.stacked and rule.leaf.startswith(tower)]
        for layer in range(shapes[stack[0].leaf][0]):
            plain |= {rule.key.format(layer): _recipe(rule, layer) for rule in stack}
    return plain


def head_sizes(shapes: Shapes) -> dict[str, dict[str, int]]:
    """What PyTorch shapes cannot tell, in the words of config.json's geometry block."""
    return {
        "vision": {"num_attention_heads": shapes[ATTENTION + "query/kernel"][2]},
        "paligemma": {"head_dim": shapes[LAYERS + "attn/q_einsum/w"][3]},
        "action_expert": {"head_dim": shapes[LAYERS + "attn/q_einsum_1/w"][3]},
    }


def merge(block: npt.NDArray[np.float32], a: Array, b: Array) -> None:
    """Add a @ b to a float32 block [..., in, out] in place, a few rows at a time."""
    step = max(1, (1 << 22) // max(1, block.shape[-1]))
    for start in range(0, block.shape[-2], step):
        rows = slice(start, start + step)
        block[..., rows, :] += a[..., rows, :] @ b


def _leaves(rule: Rule) -> tuple[str, ...]:
    return (rule.leaf,) if rule.adapter is None else (rule.leaf, rule.adapter.a, rule.adapter.b)


def _recipe(rule: Rule, *layer: int) -> Recipe:
    return Recipe(rule.leaf, (*layer, *rule.part), rule.convert, rule.adapter)


def _check_axes(rule: Rule, shapes: Shapes, folder: object) -> None:
    shape = shapes[rule.leaf]
    if len(shape) != rule.axes or 0 in shape or (rule.part and shape[1] != 2):
        pair = " of which the second has 2 entries" if rule.part else ""
        raise CheckpointError(f"{folder}: '{rule.leaf}' has shape {list(shape)}, expected {rule.axes} axes{pair}")


def _check_depth(rule: Rule, shapes: Shapes, folder: object) -> None:
    first = BLOCK + "LayerNorm_0/scale" if rule.leaf.startswith(BLOCK) else LAYERS + "attn/q_einsum/w"
    layers, expected = shapes[rule.leaf][0], shapes[first][0]
    if rule.stacked and layers != expected:
        raise CheckpointError(f"{folder}: '{rule.leaf}' stacks {layers} layers, but '{first}' stacks {expected}")


def _check_adapter(rule: Rule, shapes: Shapes, folder: object) -> None:
    adapter = rule.adapter
    if adapter is None:
        return
    shape, a, b = shapes[rule.leaf], shapes[adapter.a], shapes[adapter.b]
    rank = a[-1] if a else 0
    if rank < 1 or a != (*shape[:-1], rank) or b != (*shape[:-2], rank, shape[-1]):
        raise CheckpointError(
            f"{folder}: LoRA '{adapter.a}' {list(a)} and '{adapter.b}' {list(b)} do not fit '{rule.leaf}' "
            f"{list(shape)}: expected {[*shape[:-1], 'rank']} and {[*shape[:-2], 'rank', shape[-1]]}"
        )
    openpi = LORA_RANKS["_1" if "_1/" in rule.leaf else ""]
    if "/attn/" in rule.leaf and rank != openpi:  # the MLP's adapters are never scaled (openpi lora.py, _dot)
        raise CheckpointError(
            f"{folder}: LoRA '{adapter.a}' has rank {rank}, openpi's variant has {openpi}: its scale alpha/rank is not "
            "recorded in the checkpoint; merge the adapters where the model was trained"
        )


def _guess(shapes: Shapes) -> str:
    if "action_in_proj/kernel" in shapes:
        return ""
    if "PaliGemma/llm/embedder/input_embedding" in shapes:
        return "; without action_in_proj it may be a π0-FAST checkpoint"
    return f"; it holds {sorted(shapes)[:2]}"
