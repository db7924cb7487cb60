"""Write JAX checkpoints with the real orbax library: the folders beside this file, or one from any openpi checkpoint.

    python write_orbax.py openpi_a lora ...       # the folders named in made.json, each with the versions named there
    python write_orbax.py --checkpoint DIR --out DIR     # a π0.5 in openpi's PyTorch layout, in the type it is stored in

It needs jax, flax and orbax-checkpoint, which nothing else here does. The way from PyTorch's layout to JAX's is written
from the shapes in openpi's JAX modules (models/gemma.py, siglip.py, lora.py, pi0.py) with einsum, and shares nothing
with the reader under test.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

HERE = Path(__file__).parent
VISION = "paligemma_with_expert.paligemma.model.vision_tower.vision_model."
PROJECTOR = "paligemma_with_expert.paligemma.model.multi_modal_projector.linear."
LANGUAGE = "paligemma_with_expert.paligemma.model.language_model."
EXPERT = "paligemma_with_expert.gemma_expert.model."
PROJECTIONS = (
    "action_in_proj action_out_proj time_mlp_in time_mlp_out state_proj action_time_mlp_in action_time_mlp_out"
)
# of the small random models: (vision heads, heads of the language models)
SMALL = dict(vision=(8, 12, 2), backbone=(12, 20), expert=(8, 12), depth=3, heads=4, head_dim=4, vocab=16, actions=4)
RANKS = {"": 16, "_1": 32}  # gemma_2b_lora, gemma_300m_lora


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


def small_weights(seed, *, pi0):
    """A random model in PyTorch's layout, values that bfloat16 holds exactly."""
    draw = np.random.default_rng(seed)
    width, mlp, _ = SMALL["vision"]
    keys = {
        VISION + "embeddings.patch_embedding.weight": (width, 3, 2, 2),
        VISION + "embeddings.patch_embedding.bias": (width,),
    }
    keys |= {VISION + "embeddings.position_embedding.weight": (4, width)}
    keys |= {PROJECTOR + "weight": (SMALL["backbone"][0], width), PROJECTOR + "bias": (SMALL["backbone"][0],)}
    keys |= {LANGUAGE + "embed_tokens.weight": (SMALL["vocab"], SMALL["backbone"][0])}
    norms = [VISION + "post_layernorm"]
    for layer in range(2):
        block = f"{VISION}encoder.layers.{layer}."
        norms += [block + "layer_norm1", block + "layer_norm2"]
        shapes = {f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
        for name, shape in (shapes | {"mlp.fc1": (mlp, width), "mlp.fc2": (width, mlp)}).items():
            keys |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
    keys |= {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}
    attention, head_dim = SMALL["heads"] * SMALL["head_dim"], SMALL["head_dim"]
    for prefix, (width, mlp) in ((LANGUAGE, SMALL["backbone"]), (EXPERT, SMALL["expert"])):
        norms = [prefix + "norm"]
        for layer in range(SMALL["depth"]):
            block = f"{prefix}layers.{layer}."
            norms += [block + "input_layernorm", block + "post_attention_layernorm"]
            keys |= {
                block + "self_attn.q_proj.weight": (attention, width),
                block + "self_attn.o_proj.weight": (width, attention),
            }
            keys |= {f"{block}self_attn.{name}_proj.weight": (head_dim, width) for name in "kv"}
            keys |= {f"{block}mlp.{name}_proj.weight": (mlp, width) for name in ("gate", "up")}
            keys |= {block + "mlp.down_proj.weight": (width, mlp)}
        for norm in norms:
            if prefix == EXPERT and not pi0:
                keys |= {norm + ".dense.weight": (3 * width, width), norm + ".dense.bias": (3 * width,)}
            else:
                keys[norm + ".weight"] = (width,)
    width, dim = SMALL["expert"][0], SMALL["actions"]
    linear = {"action_in_proj": (width, dim), "action_out_proj": (dim, width)}
    linear |= (
        {"state_proj": (width, dim), "action_time_mlp_in": (width, 2 * width), "action_time_mlp_out": (width, width)}
        if pi0
        else {"time_mlp_in": (width, width), "time_mlp_out": (width, width)}
    )
    for name, shape in linear.items():
        keys |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {key: draw.normal(size=shape).astype(ml_dtypes.bfloat16).astype(np.float32) for key, shape in keys.items()}


def small_tree(weights):
    return to_jax(weights.__getitem__, set(weights), SMALL["vision"][2], SMALL["heads"])


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
        for layer in range(SMALL["depth"]):
            block = f"{prefix}layers.{layer}."
            q, kv, out = (
                [attn[name + suffix][part][layer] for part in ("w", "lora_a", "lora_b")]
                for name in ("q_einsum", "kv_einsum", "attn_vec_einsum")
            )
            width, (heads, size) = q[0].shape[1], out[0].shape[:2]
            eye = np.eye(width)[None]
            y = einsum("BTD,NDH->BTNH", "BTD,NDL->BTNL", "BTNL,NLH->BTNH", eye, *q)
            weights[block + "self_attn.q_proj.weight"] = y[0].reshape(width, -1).T
            y = einsum("BSD,2KDH->2BSKH".replace("2", "Z"), "BSD,ZKDL->ZBSKL", "ZBSKL,ZKLH->ZBSKH", eye, *kv)
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


def frozen(tree):
    """openpi's training keeps what a LoRA run does not train in bfloat16 (scripts/train.py)."""

    def cast(path, leaf):
        names = [str(part.key) for part in path]
        return leaf if "llm" not in names or "lora" in names[-1] else leaf.astype(ml_dtypes.bfloat16)

    return jax.tree_util.tree_map_with_path(cast, tree)


def spread(tree):
    """Arrays over four devices: the longest axis that four divides is cut (openpi training/sharding.py), others copied."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("fsdp",))

    def place(leaf):
        cut = [None] * leaf.ndim
        fitting = [axis for axis in range(leaf.ndim) if leaf.shape[axis] % 4 == 0]
        if leaf.ndim > 1 and fitting:
            cut[max(fitting, key=lambda axis: leaf.shape[axis])] = "fsdp"
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*cut)))

    return jax.tree.map(place, tree)


def save_training(tree, folder):
    """As openpi's training does: an nnx.State as the item "params" of a CheckpointManager."""
    flat = {tuple(str(part.key) for part in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    state = nnx.State.from_flat_path(
        {path: nnx.VariableState(nnx.Param, jax.numpy.asarray(leaf)) for path, leaf in flat.items()}
    )
    with tempfile.TemporaryDirectory() as scratch:
        manager = ocp.CheckpointManager(
            scratch,
            item_handlers={"params": ocp.PyTreeCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(max_to_keep=1, create=False),
        )
        manager.save(30, {"params": {"params": state}})
        manager.wait_until_finished()
        manager.close()
        shutil.copytree(Path(scratch) / "30" / "params", folder / "params")


def save_released(tree, folder, **layout):
    """A pure dict through PyTreeCheckpointer, which is Checkpointer(PyTreeCheckpointHandler())."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**layout)) as checkpointer:
        checkpointer.save((folder / "params").resolve(), {"params": tree})


def write(name):
    """One of the committed folders, and the tensors that reading it must give."""
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if name == "openpi_a":
        source = HERE.parent / "openpi_a"
        shutil.copyfile(source / "config.json", folder / "config.json")
        with safe_open(source / "model.safetensors", "np") as file:
            save_training(to_jax(file.get_tensor, set(file.keys()), 4, 4), folder)
        return
    weights = small_weights(7, pi0=name == "pi0")
    tree = small_tree(weights)
    if name == "pi0":
        save_file(weights, HERE / "pi0.safetensors")
        save_released(tree, folder)
    elif name == "lora":
        save_file(add_adapters(tree, weights, 8), HERE / "lora.safetensors")
        save_training(frozen(tree), folder)
    else:
        save_file(weights, HERE / "small.safetensors")
        if name == "sharded":
            save_training(spread(tree), folder)
        elif name == "bfloat16":
            save_released(jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), tree), folder)
        elif name == "files":
            save_released(tree, folder, use_ocdbt=False)
        elif name == "zarr3":
            save_released(tree, folder, use_zarr3=True)
        else:
            raise SystemExit(f"no folder {name}")


def convert(checkpoint, out):
    """A checkpoint of any size in its stored type; takes about three times its size in memory."""
    with safe_open(checkpoint / "model.safetensors", "np") as file:

        def bits(key):  # einsum does not know bfloat16
            tensor = file.get_tensor(key)
            return tensor.view(np.uint16) if tensor.dtype == ml_dtypes.bfloat16 else tensor

        tree = to_jax(bits, set(file.keys()), 16, 8)
    tree = jax.tree.map(lambda leaf: leaf.view(ml_dtypes.bfloat16) if leaf.dtype == np.uint16 else leaf, tree)
    out.mkdir(parents=True)
    save_released(tree, out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.checkpoint:
        convert(arguments.checkpoint, arguments.out)
    made = HERE / "made.json"
    record = json.loads(made.read_text()) if made.exists() else {}
    for name in arguments.names:
        write(name)
        packages = ("orbax-checkpoint", "jax", "flax", "tensorstore", "numpy")
        record[name] = {package: version(package) for package in packages}
        made.write_text(json.dumps(dict(sorted(record.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
