"""openpi's JAX parameter tree in openpi's PyTorch keys: which leaf, which part of it, turned how.

The tree is that of openpi's models/gemma.py, siglip.py, pi0.py and lora.py with the layers stacked on the first axis;
the PyTorch side is that of models_pytorch. Letters: D width, N query heads, K key and value heads, H head dimension,
F hidden width of an MLP, r rank. Gemma norms store w of x * (1 + w) on both sides, so they are taken as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]
Shapes = Mapping[str, tuple[int, ...]]

MODEL = "paligemma_with_expert."
VISION = MODEL + "paligemma.model.vision_tower.vision_model."
BLOCK = "PaliGemma/img/Transformer/encoderblock/"
ATTENTION = BLOCK + "MultiHeadDotProductAttention_0/"
LAYERS = "PaliGemma/llm/layers/"
SUMMED = "attn_vec_einsum"  # the einsum that contracts the heads


@dataclass(frozen=True)
class Adapter:
    """LoRA beside a weight: W + a @ b on the last two axes. With `summed`, b is first summed over its heads.

    That sum is what openpi's two einsums do where the heads are contracted: "BTNH,NHL->BTL", then "BTL,NLD->BTD".
    """

    a: str
    b: str
    summed: bool = False


@dataclass(frozen=True)
class Rule:
    """A line of the table. {} in the key is the layer; `axes` counts the leaf's, the stacked one included."""

    key: str
    leaf: str
    axes: int
    convert: Callable[[Array], Array]
    part: tuple[int, ...] = ()
    adapter: Adapter | None = None

    @property
    def stacked(self) -> bool:
        return "{}" in self.key


def same(block: Array) -> Array:
    return block


def transposed(block: Array) -> Array:
    """[in, out] -> [out, in], a view."""
    return block.T


def flat(block: Array) -> Array:
    """[N, H] -> [N*H]."""
    return block.reshape(-1)


def out_heads(block: Array) -> Array:
    """[D, N, H] -> [N*H, D]."""
    return block.reshape(block.shape[0], -1).T


def in_heads(block: Array) -> Array:
    """[N, H, D] -> [D, N*H]."""
    return block.reshape(-1, block.shape[-1]).T


def einsum_heads(block: Array) -> Array:
    """[N, D, H] -> [N*H, D]."""
    return block.transpose(0, 2, 1).reshape(-1, block.shape[1])


def patches(block: Array) -> Array:
    """[height, width, 3, D] -> [D, 3, height, width]."""
    return block.transpose(3, 2, 0, 1)


def positions(block: Array) -> Array:
    """[1, tokens, D] -> [tokens, D]."""
    return block.reshape(-1, block.shape[-1])


def rules(shapes: Shapes) -> Iterator[Rule]:
    """The table for a tree with these leaves: π0 or π0.5, with the adapters that are there."""
    yield from _vision()
    projector = MODEL + "paligemma.model.multi_modal_projector.linear."
    yield Rule(projector + "weight", "PaliGemma/img/head/kernel", 2, transposed)
    yield Rule(projector + "bias", "PaliGemma/img/head/bias", 1, same)
    language = MODEL + "paligemma.model.language_model."
    yield Rule(language + "embed_tokens.weight", "PaliGemma/llm/embedder/input_embedding", 2, same)
    pi05 = "PaliGemma/llm/final_norm_1/Dense_0/kernel" in shapes
    yield from _gemma(language, "", shapes, adaptive=False)
    yield from _gemma(MODEL + "gemma_expert.model.", "_1", shapes, adaptive=pi05)
    time = ("time_mlp_in", "time_mlp_out") if pi05 else ("state_proj", "action_time_mlp_in", "action_time_mlp_out")
    for name in ("action_in_proj", "action_out_proj", *time):
        yield Rule(f"{name}.weight", f"{name}/kernel", 2, transposed)
        yield Rule(f"{name}.bias", f"{name}/bias", 1, same)


def _vision() -> Iterator[Rule]:
    yield Rule(VISION + "embeddings.patch_embedding.weight", "PaliGemma/img/embedding/kernel", 4, patches)
    yield Rule(VISION + "embeddings.patch_embedding.bias", "PaliGemma/img/embedding/bias", 1, same)
    yield Rule(VISION + "embeddings.position_embedding.weight", "PaliGemma/img/pos_embedding", 3, positions)
    for ours, theirs in (("weight", "scale"), ("bias", "bias")):
        yield Rule(VISION + f"post_layernorm.{ours}", f"PaliGemma/img/Transformer/encoder_norm/{theirs}", 1, same)
        for number in (0, 1):
            key = VISION + f"encoder.layers.{{}}.layer_norm{number + 1}.{ours}"
            yield Rule(key, BLOCK + f"LayerNorm_{number}/{theirs}", 2, same)
    for number in (0, 1):
        key, leaf = VISION + f"encoder.layers.{{}}.mlp.fc{number + 1}.", BLOCK + f"MlpBlock_0/Dense_{number}/"
        yield Rule(key + "weight", leaf + "kernel", 3, transposed)
        yield Rule(key + "bias", leaf + "bias", 2, same)
    for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value")):
        key = VISION + f"encoder.layers.{{}}.self_attn.{ours}_proj."
        yield Rule(key + "weight", ATTENTION + f"{theirs}/kernel", 4, out_heads)
        yield Rule(key + "bias", ATTENTION + f"{theirs}/bias", 3, flat)
    key = VISION + "encoder.layers.{}.self_attn.out_proj."
    yield Rule(key + "weight", ATTENTION + "out/kernel", 4, in_heads)
    yield Rule(key + "bias", ATTENTION + "out/bias", 2, same)


def _gemma(prefix: str, expert: str, shapes: Shapes, *, adaptive: bool) -> Iterator[Rule]:
    layer = prefix + "layers.{}."

    attention = (
        ("q_proj", "q_einsum", 4, einsum_heads, ()),
        ("k_proj", "kv_einsum", 5, einsum_heads, (0,)),
        ("v_proj", "kv_einsum", 5, einsum_heads, (1,)),
        ("o_proj", SUMMED, 4, in_heads, ()),
    )
    for ours, theirs, axes, convert, part in attention:
        leaf = f"{LAYERS}attn/{theirs}{expert}/"
        adapter = _adapter(shapes, leaf + "lora_a", leaf + "lora_b", theirs == SUMMED)
        yield Rule(f"{layer}self_attn.{ours}.weight", leaf + "w", axes, convert, part, adapter)
    mlp = (
        ("gate_proj", "gating_einsum", 4, (0,)),
        ("up_proj", "gating_einsum", 4, (1,)),
        ("down_proj", "linear", 3, ()),
    )
    for ours, theirs, axes, part in mlp:
        leaf = f"{LAYERS}mlp{expert}/{theirs}"
        adapter = _adapter(shapes, leaf + "_lora_a", leaf + "_lora_b")
        yield Rule(f"{layer}mlp.{ours}.weight", leaf, axes, transposed, part, adapter)
    norms = (
        (layer + "input_layernorm.", f"{LAYERS}pre_attention_norm{expert}/", 1),
        (layer + "post_attention_layernorm.", f"{LAYERS}pre_ffw_norm{expert}/", 1),
        (prefix + "norm.", f"PaliGemma/llm/final_norm{expert}/", 0),
    )
    for key, leaf, stacked in norms:
        if adaptive:
            yield Rule(key + "dense.weight", leaf + "Dense_0/kernel", 2 + stacked, transposed)
            yield Rule(key + "dense.bias", leaf + "Dense_0/bias", 1 + stacked, same)
        else:
            yield Rule(key + "weight", leaf + "scale", 1 + stacked, same)


def _adapter(shapes: Shapes, a: str, b: str, summed: bool = False) -> Adapter | None:
    return Adapter(a, b, summed) if a in shapes and b in shapes else None
