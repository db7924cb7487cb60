"""Write LoRA adapters of the model in ../openpi_a with the peft library, and the weights that peft merges from them.

    pip install torch==2.13.0 peft==0.21.2 safetensors && python tests/data/lora/make.py

The module tree has the names and layer types that LeRobot's PI05Policy (openpi's model under `model.`) has; what the
layers compute does not matter to peft. Each folder holds adapter_config.json, adapter_model.safetensors and
merged.safetensors: every tensor that merge_and_unload() changed, float32, under openpi's names.
"""

import shutil
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

HERE = Path(__file__).parent
EXPERT_QV = r".*\.gemma_expert\..*layers\.[01]\.self_attn\.(q|v)_proj"
EXPERT = "paligemma_with_expert.gemma_expert.model."
VISION = "paligemma_with_expert.paligemma.model.vision_tower.vision_model."
EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens"
LM_HEAD = "paligemma_with_expert.paligemma.lm_head"
TIED = {f"{EMBEDDING}.weight": f"{LM_HEAD}.weight"}


class Norm(nn.Module):
    """A norm with a weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))


def layer(name: str, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """The module that holds `weight` and perhaps `bias`."""
    weight, bias = tensors["weight"], "bias" in tensors
    if weight.ndim == 1:
        return nn.LayerNorm(weight.shape[0]) if bias else Norm(weight.shape[0])
    if weight.ndim == 4:
        return nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], weight.shape[2], bias=bias)
    if name.endswith(("embed_tokens", "position_embedding")):
        return nn.Embedding(*weight.shape)
    return nn.Linear(weight.shape[1], weight.shape[0], bias=bias)


def model(state: dict[str, torch.Tensor]) -> nn.Module:
    """A module tree whose state_dict is `state`."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        name, _, part = key.rpartition(".")
        parts.setdefault(name, {})[part] = value
    root = nn.Module()
    for name, tensors in parts.items():
        parent = root
        *path, last = name.split(".")
        for step in path:
            if not hasattr(parent, step):
                parent.add_module(step, nn.Module())
            parent = getattr(parent, step)
        parent.add_module(last, layer(name, tensors))
    root.load_state_dict(state)
    return root


def write(name: str, *, prefix: str = "model.", train: str = "lora_|modules_to_save", **settings: object) -> None:
    """One adapter folder. `train`: what an optimizer would have changed, given random values here."""
    torch.manual_seed(len(name))
    base = load_file(HERE.parent / "openpi_a" / "model.safetensors")
    base |= {missing: base[stored] for missing, stored in TIED.items()}
    policy = model({prefix + key: value.clone() for key, value in base.items()})
    policy.name_or_path = "lerobot/pi05_base"
    peft = get_peft_model(policy, LoraConfig(**settings))
    with torch.no_grad():
        for key, value in peft.named_parameters():
            if any(word in key for word in train.split("|")):
                value.add_(torch.randn_like(value) * 0.1)
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    peft.save_pretrained(folder)
    (folder / "README.md").unlink()
    merged = {key.removeprefix(prefix): value for key, value in peft.merge_and_unload().state_dict().items()}
    assert set(merged) == set(base)
    changed = {key: value.contiguous() for key, value in merged.items() if not torch.equal(value, base[key])}
    save_file(changed, folder / "merged.safetensors")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    write(  # what LeRobot does by default, with ranks and alphas of some layers set apart and one layer trained in full
        "lerobot",
        r=4,
        lora_alpha=8,
        target_modules=rf"({EXPERT_QV}|model\.(action_in_proj|time_mlp_in))",
        rank_pattern={"layers.0.self_attn.q_proj": 2, r"time_mlp_\w+": 6},
        alpha_pattern={r"model\.action_in_proj": 3, "v_proj": 5},
        modules_to_save=["model.action_out_proj"],
        inference_mode=True,
    )
    write(  # openpi's names without `model.`, rank-stabilised scale, a convolution, an embedding
        "rslora",
        prefix="",
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["patch_embedding", "embed_tokens", "action_in_proj"],
    )
    write(
        "dora",
        r=4,
        lora_alpha=8,
        use_dora=True,
        target_modules=rf"({EXPERT_QV}|model\.time_mlp_out)",
    )
    write(  # biases: trained themselves, and a low-rank update with one
        "bias",
        r=2,
        lora_alpha=3,
        bias="all",
        lora_bias=True,
        target_modules=["time_mlp_in", "linear"],
        train="lora_|time_mlp_in.base_layer.bias|post_layernorm.bias",
    )
    write(  # the head of the language model, which no action trains: B stays zero
        "all_linear",
        r=1,
        lora_alpha=1,
        target_modules=["lm_head", "time_mlp_in"],
        train="time_mlp_in.lora_",
    )
