"""openpi's PyTorch tensors in the layout of its JAX modules: models/gemma.py, siglip.py and pi0.py, by einsum.

Written from the shapes in those modules, and sharing nothing with the reader under test.
"""

import numpy as np

VISION = "paligemma_with_expert.paligemma.model.vision_tower.vision_model."
PROJECTOR = "paligemma_with_expert.paligemma.model.multi_modal_projector.linear."
LANGUAGE = "paligemma_with_expert.paligemma.model.language_model."
EXPERT = "paligemma_with_expert.gemma_expert.model."
PROJECTIONS = (
    "action_in_proj action_out_proj time_mlp_in time_mlp_out state_proj action_time_mlp_in action_time_mlp_out"
)


def to_jax(get, keys, vision_heads, heads):
    """openpi's PyTorch tensors (`get(key)`) as openpi's JAX tree of numpy arrays."""

    def stack(prefix, name, turn=lambda x: x):
        count = len([key for key in keys if key.startswith(prefix) and key.endswith("." + name)])
        return np.stack([turn(get(f"{prefix}{layer}.{name}")) for layer in range(count)])

    def heads_first(x):  # [N*H, D] -> [N, D, H]
        return np.einsum("nhd->ndh", x.reshape(heads, -1, x.shape[1]))

    def one_head(x):  # one key and value head: [H, D] -> [1, D, H]
        return np.einsum("khd->kdh", x[None])

    def output(x):  # [D, N*H] -> [N, H, D]
        return np.einsum("dnh->nhd", x.reshape(x.shape[0], heads, -1))

    def flip(x):
        return np.einsum("oi->io", x)

    def vision_in(x):  # [N*H, D] -> [D, N, H]
        return np.einsum("nhd->dnh", x.reshape(vision_heads, -1, x.shape[1]))

    def vision_out(x):  # [D, N*H] -> [N, H, D]
        return np.einsum("dnh->nhd", x.reshape(x.shape[0], vision_heads, -1))

    block, attention = VISION + "encoder.layers.", {}
    for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value")):
        attention[theirs] = {
            "kernel": stack(block, f"self_attn.{ours}_proj.weight", vision_in),
            "bias": stack(block, f"self_attn.{ours}_proj.bias", lambda x: x.reshape(vision_heads, -1)),
        }
    attention["out"] = {
        "kernel": stack(block, "self_attn.out_proj.weight", vision_out),
        "bias": stack(block, "self_attn.out_proj.bias"),
    }
    image = {
        "embedding": {
            "kernel": np.einsum("dchw->hwcd", get(VISION + "embeddings.patch_embedding.weight")),
            "bias": get(VISION + "embeddings.patch_embedding.bias"),
        },
        "pos_embedding": get(VISION + "embeddings.position_embedding.weight")[None],
        "head": {"kernel": flip(get(PROJECTOR + "weight")), "bias": get(PROJECTOR + "bias")},
        "Transformer": {
            "encoder_norm": {
                "scale": get(VISION + "post_layernorm.weight"),
                "bias": get(VISION + "post_layernorm.bias"),
            },
            "encoderblock": {
                "LayerNorm_0": {"scale": stack(block, "layer_norm1.weight"), "bias": stack(block, "layer_norm1.bias")},
                "LayerNorm_1": {"scale": stack(block, "layer_norm2.weight"), "bias": stack(block, "layer_norm2.bias")},
                "MlpBlock_0": {
                    "Dense_0": {"kernel": stack(block, "mlp.fc1.weight", flip), "bias": stack(block, "mlp.fc1.bias")},
                    "Dense_1": {"kernel": stack(block, "mlp.fc2.weight", flip), "bias": stack(block, "mlp.fc2.bias")},
                },
                "MultiHeadDotProductAttention_0": attention,
            },
        },
    }
    attn, layers, llm = {}, {}, {}
    for prefix, suffix in ((LANGUAGE, ""), (EXPERT, "_1")):
        block = prefix + "layers."
        attn["q_einsum" + suffix] = {"w": stack(block, "self_attn.q_proj.weight", heads_first)}
        k, v = (stack(block, f"self_attn.{name}_proj.weight", one_head) for name in "kv")
        attn["kv_einsum" + suffix] = {"w": np.stack([k, v], axis=1)}
        attn["attn_vec_einsum" + suffix] = {"w": stack(block, "self_attn.o_proj.weight", output)}
        gate, up = (stack(block, f"mlp.{name}_proj.weight", flip) for name in ("gate", "up"))
        gating = np.stack([gate, up], axis=1)
        del gate, up
        layers["mlp" + suffix] = {"gating_einsum": gating, "linear": stack(block, "mlp.down_proj.weight", flip)}
        adaptive = prefix + "norm.dense.weight" in keys
        for ours, theirs in (("input_layernorm", "pre_attention_norm"), ("post_attention_layernorm", "pre_ffw_norm")):
            layers[theirs + suffix] = (
                {
                    "Dense_0": {
                        "kernel": stack(block, f"{ours}.dense.weight", flip),
                        "bias": stack(block, f"{ours}.dense.bias"),
                    }
                }
                if adaptive
                else {"scale": stack(block, f"{ours}.weight")}
            )
        llm["final_norm" + suffix] = (
            {"Dense_0": {"kernel": flip(get(prefix + "norm.dense.weight")), "bias": get(prefix + "norm.dense.bias")}}
            if adaptive
            else {"scale": get(prefix + "norm.weight")}
        )
    table = LANGUAGE + "embed_tokens.weight"
    table = table if table in keys else "paligemma_with_expert.paligemma.lm_head.weight"
    llm |= {"embedder": {"input_embedding": get(table)}, "layers": {"attn": attn, **layers}}
    tree = {"PaliGemma": {"img": image, "llm": llm}}
    for name in PROJECTIONS.split():
        if f"{name}.weight" in keys:
            tree[name] = {"kernel": flip(get(f"{name}.weight")), "bias": get(f"{name}.bias")}
    return tree
