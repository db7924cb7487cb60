"""Run by LeRobot's Python: the actions of a bundle inside LeRobot beside those of LeRobot's own policy.

    compare_pi05.py CHECKPOINT BUNDLE

CHECKPOINT is a small pi05 that LeRobot saved. Its configuration names the released sizes, so that LeRobot's
constructors are given those of its tensors. Prints one line of JSON: the largest differences.
"""

import dataclasses
import json
import sys
from pathlib import Path

import draccus
import numpy as np
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.pi05 import modeling_pi05
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.utils import prepare_observation_for_inference
from lerobot.processor import UnnormalizerProcessorStep
from lerobot.utils.import_utils import register_third_party_plugins
from safetensors import safe_open


def small(folder: Path) -> None:
    """Let LeRobot's constructors build the model of these tensors."""
    with safe_open(folder / "model.safetensors", "np") as file:
        shapes = {name.removeprefix("model."): file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118

    def gemma(prefix: str, width: int) -> modeling_pi05.GemmaConfig:
        depth = 1 + max(
            int(name.split("layers.")[1].split(".")[0]) for name in shapes if name.startswith(f"{prefix}layers.")
        )
        head = shapes[f"{prefix}layers.0.self_attn.k_proj.weight"][0]
        heads = shapes[f"{prefix}layers.0.self_attn.q_proj.weight"][0] // head
        mlp = shapes[f"{prefix}layers.0.mlp.up_proj.weight"][0]
        return modeling_pi05.GemmaConfig(width, depth, mlp, heads, 1, head)

    both = "paligemma_with_expert."
    vocabulary, width = shapes[f"{both}paligemma.lm_head.weight"]
    vision = f"{both}paligemma.model.vision_tower.vision_model."
    hidden = shapes[f"{vision}post_layernorm.weight"][0]
    sizes = {
        "gemma_2b": gemma(f"{both}paligemma.model.language_model.", width),
        "gemma_300m": gemma(f"{both}gemma_expert.model.", shapes["action_in_proj.weight"][0]),
    }
    modeling_pi05.get_gemma_config = sizes.__getitem__
    build, build_expert = modeling_pi05.PaliGemmaForConditionalGenerationWithPiGemma, modeling_pi05.PiGemmaForCausalLM

    def paligemma(config: object) -> object:
        config._vocab_size = config.image_token_index = config.text_config.vocab_size = vocabulary
        config.vision_config.hidden_size = hidden
        config.vision_config.intermediate_size = shapes[f"{vision}encoder.layers.0.mlp.fc1.weight"][0]
        config.vision_config.num_hidden_layers = 1 + max(
            int(name.split("encoder.layers.")[1].split(".")[0]) for name in shapes if "encoder.layers." in name
        )
        config.vision_config.projection_dim = width
        return build(config=config)

    def expert(config: object) -> object:
        config.vocab_size = vocabulary
        return build_expert(config=config)

    modeling_pi05.PaliGemmaForConditionalGenerationWithPiGemma = paligemma
    modeling_pi05.PiGemmaForCausalLM = expert


def known_config(folder: Path) -> PreTrainedConfig:
    """The checkpoint's configuration, without the fields that this LeRobot does not know yet."""
    kind = PreTrainedConfig.get_choice_class("pi05")
    content = json.loads((folder / "config.json").read_text())
    names = {field.name for field in dataclasses.fields(kind)}
    return draccus.decode(kind, {name: value for name, value in content.items() if name in names})


def observation(golden: np.lib.npyio.NpzFile) -> dict[str, torch.Tensor]:
    """The recorded observation, as LeRobot's control loop makes it."""
    pictures = {key: golden[key] for key in golden if key.startswith("0/observation:images/")}
    raw = {f"observation.images.{key.rsplit('/', 1)[1]}": value for key, value in pictures.items()}
    raw["observation.state"] = golden["0/observation:state"]
    return prepare_observation_for_inference(raw, torch.device("cpu"), str(golden["0/prompt"]), "robot")


def opened(config: PreTrainedConfig, path: Path | None) -> tuple:
    policy = get_policy_class(config.type).from_pretrained(path, config=config)
    words = {} if path is None else {"tokenizer_processor": {"tokenizer_name": str(path / "tokenizer")}}
    where = None if path is None else str(path)
    return (policy.eval(), *make_pre_post_processors(config, pretrained_path=where, preprocessor_overrides=words))


def chunk(parts: tuple, golden: np.lib.npyio.NpzFile, **more: object) -> np.ndarray:
    policy, before, after = parts
    policy.reset()
    with torch.no_grad():
        return after(policy.predict_action_chunk(before(observation(golden)), **more)).squeeze(0).numpy()


def normalised(parts: tuple, actions: torch.Tensor) -> torch.Tensor:
    """Actions in robot units as LeRobot's own policy keeps them between chunks."""
    step = next(step for step in parts[2].steps if isinstance(step, UnnormalizerProcessorStep))
    return step._normalize_action(actions, inverse=False)


def continued(parts: tuple, golden: np.lib.npyio.NpzFile, left: torch.Tensor, noise: torch.Tensor) -> np.ndarray:
    """A chunk that continues `left`, as the engine of `lerobot-rollout --inference.type=rtc` asks for it."""
    policy = parts[0]
    policy.config.rtc_config = RTCConfig(execution_horizon=6, max_guidance_weight=5.0)
    if hasattr(policy, "init_rtc_processor"):
        policy.init_rtc_processor()
    filled = torch.cat([left[:6], torch.zeros(4, left.shape[1])])  # LeRobot fills with zeros up to a length
    return chunk(parts, golden, noise=noise, inference_delay=2, prev_chunk_left_over=filled)


def main() -> None:
    checkpoint, bundle = map(Path, sys.argv[1:3])
    register_third_party_plugins()
    golden = np.load(checkpoint / "golden.npz")
    small(checkpoint)
    own = known_config(checkpoint)
    config = PreTrainedConfig.get_choice_class("ki_edge")(bundle=str(bundle), device="cpu", n_action_steps=4)
    theirs, ours = opened(own, checkpoint), opened(config, None)
    noise = torch.from_numpy(golden["0/noise"])[None]
    found = {name: chunk(parts, golden, noise=noise) for name, parts in (("theirs", theirs), ("ours", ours))}
    drawn = {}
    for name, parts in (("theirs", theirs), ("ours", ours)):
        torch.manual_seed(7)
        drawn[name] = chunk(parts, golden)
    policy, before, after = ours
    policy.reset()
    torch.manual_seed(7)
    with torch.no_grad():
        selected = [after(policy.select_action(before(observation(golden)))).squeeze(0).numpy() for _ in range(4)]
    left = torch.from_numpy(drawn["ours"][3:])
    steered = {
        "ours": continued(ours, golden, left, noise),
        "theirs": continued(theirs, golden, normalised(theirs, left), noise),
    }
    result = {
        "shape": list(found["ours"].shape),
        "same_noise": float(np.abs(found["ours"] - found["theirs"]).max()),
        "same_seed": float(np.abs(drawn["ours"] - drawn["theirs"]).max()),
        "golden": float(np.abs(found["ours"] - golden["0/actions"]).max()),
        "theirs_golden": float(np.abs(found["theirs"] - golden["0/actions"]).max()),
        "largest": float(np.abs(found["theirs"]).max()),
        "selected": float(np.abs(np.stack(selected) - drawn["ours"][:4]).max()),
        "seam_plain": float(np.abs(found["ours"][:2] - drawn["ours"][3:5]).max()),
        "seam_joined": float(np.abs(steered["ours"][:2] - drawn["ours"][3:5]).max()),
        "same_joined": float(np.abs(steered["ours"] - steered["theirs"]).max()),
    }
    print(json.dumps(result))  # noqa: T201


if __name__ == "__main__":
    main()
