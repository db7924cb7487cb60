"""Small random π0 and π0.5 models in PyTorch's layout, and what LoRA adapters make of them."""

import ml_dtypes
import numpy as np
from jax_layout import EXPERT, LANGUAGE, PROJECTOR, VISION, to_jax

VISION_SIZES = {"width": 8, "mlp": 12, "heads": 2, "depth": 2}
SIZES = {LANGUAGE: (12, 20), EXPERT: (8, 12)}  # width, hidden width of the MLP
HEADS, HEAD_DIM, DEPTH = 4, 4, 3
VOCABULARY, ACTIONS = 16, 4
RANKS = {"": 16, "_1": 32}  # gemma_2b_lora, gemma_300m_lora


def small_weights(seed, *, pi0):
    """A random model by openpi's keys, float32 values that bfloat16 holds exactly."""
    draw = np.random.default_rng(seed)
    shapes = vision_shapes() | {LANGUAGE + "embed_tokens.weight": (VOCABULARY, SIZES[LANGUAGE][0])}
    for prefix in SIZES:
        shapes |= gemma_shapes(prefix, adaptive=prefix == EXPERT and not pi0)
    width = SIZES[EXPERT][0]
    linear = {"action_in_proj": (width, ACTIONS), "action_out_proj": (ACTIONS, width)}
    if pi0:
        linear |= {"state_proj": (width, ACTIONS), "action_time_mlp_in": (width, 2 * width)}
        linear |= {"action_time_mlp_out": (width, width)}
    else:
        linear |= {"time_mlp_in": (width, width), "time_mlp_out": (width, width)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {key: draw.normal(size=shape).astype(ml_dtypes.bfloat16).astype(np.float32) for key, shape in shapes.items()}


def vision_shapes():
    """Patches of 2 by 2 of an image of 4 by 4."""
    width, mlp, out = VISION_SIZES["width"], VISION_SIZES["mlp"], SIZES[LANGUAGE][0]
    shapes = {
        VISION + "embeddings.patch_embedding.weight": (width, 3, 2, 2),
        VISION + "embeddings.patch_embedding.bias": (width,),
        VISION + "embeddings.position_embedding.weight": (4, width),
        PROJECTOR + "weight": (out, width),
        PROJECTOR + "bias": (out,),
    }
    norms = [VISION + "post_layernorm"]
    for layer in range(VISION_SIZES["depth"]):
        block = f"{VISION}encoder.layers.{layer}."
        norms += [block + "layer_norm1", block + "layer_norm2"]
        linear = {f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
        for name, shape in (linear | {"mlp.fc1": (mlp, width), "mlp.fc2": (width, mlp)}).items():
            shapes |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
    return shapes | {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}


def gemma_shapes(prefix, *, adaptive):
    width, mlp = SIZES[prefix]
    shapes, norms = {}, [prefix + "norm"]
    for layer in range(DEPTH):
        block = f"{prefix}layers.{layer}."
        norms += [block + "input_layernorm", block + "post_attention_layernorm"]
        shapes |= {block + "self_attn.q_proj.weight": (HEADS * HEAD_DIM, width)}
        shapes |= {block + "self_attn.o_proj.weight": (width, HEADS * HEAD_DIM)}
        shapes |= {f"{block}self_attn.{name}_proj.weight": (HEAD_DIM, width) for name in "kv"}
        shapes |= {f"{block}mlp.{name}_proj.weight": (mlp, width) for name in ("gate", "up")}
        shapes |= {block + "mlp.down_proj.weight": (width, mlp)}
    for norm in norms:
        if adaptive:
            shapes |= {norm + ".dense.weight": (3 * width, width), norm + ".dense.bias": (3 * width,)}
        else:
            shapes[norm + ".weight"] = (width,)
    return shapes


def small_tree(weights):
    return to_jax(weights.__getitem__, set(weights), VISION_SIZES["heads"], HEADS)


def add_adapters(tree, weights, seed):
    """Put LoRA beside every einsum of openpi's two lora variants; `weights` becomes what the layers then compute.

    Each merged weight is measured: identity through openpi's equations (lora.py, Einsum and FeedForward) in float64.
    """
    draw = np.random.default_rng(seed)
    layers = tree["PaliGemma"]["llm"]["layers"]

    def pair(leaf, rank):
        a = draw.normal(size=(*leaf.shape[:-1], rank)).astype(np.float32) / 8
        return a, draw.normal(size=(*leaf.shape[:-2], rank, leaf.shape[-1])).astype(np.float32) / 8

    def einsum(equation, first, second, x, w, a, b):
        wide = [np.asarray(value, np.float64) for value in (x, w, a, b)]
        return np.einsum(equation, wide[0], wide[1]) + np.einsum(second, np.einsum(first, wide[0], wide[2]), wide[3])

    for prefix, suffix in ((LANGUAGE, ""), (EXPERT, "_1")):
        attn, mlp = layers["attn"], layers["mlp" + suffix]
        for name in ("q_einsum", "kv_einsum", "attn_vec_einsum"):
            node = attn[name + suffix]
            node["lora_a"], node["lora_b"] = pair(node["w"], RANKS[suffix])
        for name in ("gating_einsum", "linear"):
            mlp[name + "_lora_a"], mlp[name + "_lora_b"] = pair(mlp[name], RANKS[suffix])
        for layer in range(DEPTH):
            block = f"{prefix}layers.{layer}."
            q, kv, out = (
                [attn[name + suffix][part][layer] for part in ("w", "lora_a", "lora_b")]
                for name in ("q_einsum", "kv_einsum", "attn_vec_einsum")
            )
            width, (heads, size) = q[0].shape[1], out[0].shape[:2]
            eye = np.eye(width)[None]
            y = einsum("BTD,NDH->BTNH", "BTD,NDL->BTNL", "BTNL,NLH->BTNH", eye, *q)
            weights[block + "self_attn.q_proj.weight"] = y[0].reshape(width, -1).T
            y = einsum("BSD,ZKDH->ZBSKH", "BSD,ZKDL->ZBSKL", "ZBSKL,ZKLH->ZBSKH", eye, *kv)
            weights[block + "self_attn.k_proj.weight"] = y[0, 0, :, 0].T
            weights[block + "self_attn.v_proj.weight"] = y[1, 0, :, 0].T
            each = np.eye(heads * size).reshape(1, -1, heads, size)
            y = einsum("BTNH,NHD->BTD", "BTNH,NHL->BTL", "BTL,NLD->BTD", each, *out)
            weights[block + "self_attn.o_proj.weight"] = y[0].T
            for number, name in enumerate(("gate", "up")):
                w, a, b = (
                    mlp["gating_einsum" + part][layer, number].astype(float) for part in ("", "_lora_a", "_lora_b")
                )
                weights[f"{block}mlp.{name}_proj.weight"] = (np.eye(width) @ w + np.eye(width) @ a @ b).T
            w, a, b = (mlp["linear" + part][layer].astype(float) for part in ("", "_lora_a", "_lora_b"))
            weights[block + "mlp.down_proj.weight"] = (w + a @ b).T
    return {key: np.ascontiguousarray(value, np.float32) for key, value in weights.items()}
