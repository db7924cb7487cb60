"""Names of a checkpoint's tensors: openpi's keys, the spellings of other versions, and the shapes they must have.

Facts: openpi models_pytorch/pi0_pytorch.py and gemma_pytorch.py, LeRobot policies/pi05, transformers before 4.52.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ki_edge.config import GemmaConfig, Pi05Config, VisionConfig

PALIGEMMA = "paligemma_with_expert.paligemma."
EMBEDDING = PALIGEMMA + "model.language_model.embed_tokens.weight"
LM_HEAD = PALIGEMMA + "lm_head.weight"
EXPERT_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"
VISION = PALIGEMMA + "model.vision_tower.vision_model."
PROJECTOR = PALIGEMMA + "model.multi_modal_projector.linear."
BACKBONE = PALIGEMMA + "model.language_model."
EXPERT = "paligemma_with_expert.gemma_expert.model."
# our module prefix -> the checkpoint's; everything after it is spelled the same
PREFIXES = {"vision.": VISION, "projector.": PROJECTOR, "backbone.": BACKBONE, "expert.": EXPERT}
# stored by some writers and read by nobody: heads, and what LeRobot leaves behind when a π0 became a π0.5
UNUSED = re.compile(
    "|".join(
        (
            re.escape(LM_HEAD),
            re.escape(EXPERT_HEAD),
            re.escape(EXPERT) + r"embed_tokens\.weight",
            r".*\.rotary_emb\.inv_freq",
            r".*\.embeddings\.position_ids",
            re.escape(VISION) + r"head\..*",
            r"(normalize_inputs|normalize_targets|unnormalize_outputs)\.buffer_.*",  # LeRobot before 0.4
        )
    )
)
WRAPPERS = re.compile(r"(^|\.)_orig_mod(?=\.)|^module(?=\.)")  # torch.compile, DistributedDataParallel
# transformers before 4.52 nested the language model the other way round
OLD_SPELLINGS = (
    (PALIGEMMA + "language_model.model.", BACKBONE),
    (PALIGEMMA + "language_model.lm_head.", PALIGEMMA + "lm_head."),
    (PALIGEMMA + "vision_tower.", PALIGEMMA + "model.vision_tower."),
    (PALIGEMMA + "multi_modal_projector.", PALIGEMMA + "model.multi_modal_projector."),
)
TIME_LAYERS = ("time_mlp_in", "time_mlp_out")
Shapes = dict[str, tuple[int, ...]]


def checkpoint_key(name: str) -> str:
    """The checkpoint's key for one of the model's parameter names."""
    for ours, theirs in PREFIXES.items():
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name


def canonical(name: str) -> str:
    """openpi's key for a stored name: without wrappers and LeRobot's `model.`, in today's spelling."""
    name = WRAPPERS.sub("", name).lstrip(".")
    name = name.removeprefix("model.")
    for old, new in OLD_SPELLINGS:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def is_pi05(keys: Mapping[str, object]) -> bool:
    """adaRMS in the action expert makes a model a π0.5; a π0 has plain norms there."""
    return EXPERT + "norm.dense.weight" in keys


def is_pi0(keys: Mapping[str, object]) -> bool:
    """A π0: the state is a token, and time enters through the action tokens."""
    return "state_proj.weight" in keys and "action_time_mlp_in.weight" in keys and not is_pi05(keys)


def parameter_shapes(config: Pi05Config) -> Shapes:
    """Every tensor that the model needs, by openpi's key."""
    shapes: Shapes = {EMBEDDING: (config.vocab_size, config.backbone.width)}
    shapes.update(_vision(config.vision))
    shapes.update(_linear(PROJECTOR[:-1], config.vision.width, config.backbone.width))
    for prefix, gemma in ((BACKBONE, config.backbone), (EXPERT, config.expert)):
        for layer in range(gemma.depth):
            shapes.update(_gemma_layer(f"{prefix}layers.{layer}.", gemma))
    width, dim = config.expert.width, config.action_dim
    shapes.update(_linear("action_in_proj", dim, width))
    shapes.update(_linear("action_out_proj", width, dim))
    for norm in _norms(BACKBONE, config.backbone.depth):
        shapes[f"{norm}.weight"] = (config.backbone.width,)
    if config.variant == "pi0":
        shapes.update(_linear("state_proj", config.state_size, width))
        shapes.update(_linear("action_time_mlp_in", 2 * width, width))
        shapes.update(_linear("action_time_mlp_out", width, width))
        shapes.update({f"{norm}.weight": (width,) for norm in _norms(EXPERT, config.expert.depth)})
        return shapes
    for name in TIME_LAYERS:
        shapes.update(_linear(name, width, width))
    for norm in _norms(EXPERT, config.expert.depth):
        shapes.update(_linear(f"{norm}.dense", width, 3 * width))
    return shapes


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norms(prefix: str, depth: int) -> Iterator[str]:
    for layer in range(depth):
        yield f"{prefix}layers.{layer}.input_layernorm"
        yield f"{prefix}layers.{layer}.post_attention_layernorm"
    yield f"{prefix}norm"


def _vision(config: VisionConfig) -> Shapes:
    width, patch = config.width, config.patch_size
    shapes: Shapes = {
        VISION + "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        VISION + "embeddings.patch_embedding.bias": (width,),
        VISION + "embeddings.position_embedding.weight": (config.patches, width),
    }
    norms = [VISION + "post_layernorm"]
    for layer in range(config.depth):
        prefix = f"{VISION}encoder.layers.{layer}."
        norms += [prefix + "layer_norm1", prefix + "layer_norm2"]
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes.update(_linear(f"{prefix}self_attn.{name}", width, width))
        shapes.update(_linear(prefix + "mlp.fc1", width, config.mlp_dim))
        shapes.update(_linear(prefix + "mlp.fc2", config.mlp_dim, width))
    shapes.update({f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")})
    return shapes


def _gemma_layer(prefix: str, config: GemmaConfig) -> Shapes:
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        prefix + "self_attn.q_proj.weight": (heads, config.width),
        prefix + "self_attn.k_proj.weight": (kv, config.width),
        prefix + "self_attn.v_proj.weight": (kv, config.width),
        prefix + "self_attn.o_proj.weight": (config.width, heads),
        prefix + "mlp.gate_proj.weight": (config.mlp_dim, config.width),
        prefix + "mlp.up_proj.weight": (config.mlp_dim, config.width),
        prefix + "mlp.down_proj.weight": (config.width, config.mlp_dim),
    }
