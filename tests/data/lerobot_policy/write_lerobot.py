"""Write this folder with LeRobot: the files of small policies, and what LeRobot's processors make of observations.

    python write_lerobot.py 0.6.1     # Python 3.12, lerobot[pi] of that version installed, as of 0.4.4

Each policy folder has config.json, the two processors and their state files as LeRobot saves them, and vectors.npz:

    state f32 [N,s], tasks [N]       observations
    prompts [N]                      the text that LeRobot gives its tokenizer
    normalized_state f32 [N,s]       its state when the prompt is made
    model_actions f32 [N,H,a]        what a model could answer, normalised
    actions f32 [N,H,a]              those in robot units

images.npz: pictures u8, and what resize_with_pad_torch makes of them / 255 at 224 x 224: every fifth pixel, a row and a
column, f32 in 0..1.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi0.processor_pi0 import make_pi0_pre_post_processors
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pi05.modeling_pi05 import resize_with_pad_torch
from lerobot.policies.pi05.processor_pi05 import make_pi05_pre_post_processors
from lerobot.processor import RenameObservationsProcessorStep, TokenizerProcessorStep, tokenizer_processor

try:
    from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
except ImportError:
    from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature

HERE = Path(__file__).parent
N, HORIZON = 24, 5
TASKS = ["pick up the red cube", "Open the_drawer", " fold the\ntowel \n", "Put it in the Bin\n"]
JOINTS = ["shoulder_pan.pos", "shoulder_lift.pos", "elbow.pos", "wrist.pos", "wrist_roll.pos", "Gripper.pos"]
POLICIES = {
    "pi0": (PI0Config, make_pi0_pre_post_processors),
    "pi05": (PI05Config, make_pi05_pre_post_processors),
}


class Words:
    """Stands in for the tokenizer, which is not ours to give away: keeps the text that it is given."""

    def __call__(self, text, max_length, **_):
        self.text = list(text)
        ids = torch.zeros(len(self.text), max_length, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": ids + 1}


def feature(kind, *shape):
    return PolicyFeature(type=kind, shape=shape)


def stats(rng, size):
    low = rng.uniform(-2, 0, size)
    high = low + rng.uniform(0.5, 3, size)
    high[1] = low[1]  # a joint that never moved
    values = {"min": low - 0.5, "max": high + 0.5, "q01": low, "q10": low + 0.1, "q90": high - 0.1, "q99": high,
              "mean": (low + high) / 2, "std": (high - low) / 3, "count": np.array([100.0])}  # fmt: skip
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}


def write(name, kind, modes, *, cameras, state_dim, action_dim, rename=None, **options):
    rng = np.random.default_rng(len(name))
    make, build = POLICIES[kind]
    inputs = {f"observation.images.{camera}": feature(FeatureType.VISUAL, 3, 48, 64) for camera in cameras}
    inputs["observation.state"] = feature(FeatureType.STATE, state_dim)
    config = make(
        device="cpu", chunk_size=HORIZON, n_action_steps=3, input_features=inputs,
        output_features={"action": feature(FeatureType.ACTION, action_dim)},
        normalization_mapping={key: NormalizationMode(mode) for key, mode in modes.items()}, **options,
    )  # fmt: skip
    config.validate_features()
    known = {"observation.state": stats(rng, state_dim), "action": stats(rng, action_dim)}
    known["observation.images.front"] = {"mean": torch.rand(3, 1, 1), "std": torch.rand(3, 1, 1)}
    before, after = build(config, dataset_stats=known)
    words = next(step.input_tokenizer for step in before.steps if isinstance(step, TokenizerProcessorStep))
    next(step for step in before.steps if isinstance(step, RenameObservationsProcessorStep)).rename_map = rename or {}
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    config.save_pretrained(folder)
    before.save_pretrained(folder)
    after.save_pretrained(folder)

    low, high = known["observation.state"]["q01"].numpy(), known["observation.state"]["q99"].numpy()
    state = (low + rng.uniform(-0.2, 1.2, (N, state_dim)) * (high - low)).astype(np.float32)
    state[0], state[1] = low, high
    tasks = [TASKS[i % len(TASKS)] for i in range(N)]
    model_actions = rng.normal(size=(N, HORIZON, action_dim)).astype(np.float32)
    prompts, normalized, actions = [], [], []
    for row, task, answer in zip(state, tasks, model_actions, strict=True):
        batch = before({"observation.state": torch.from_numpy(row), "task": task})
        normalized.append(batch["observation.state"].numpy()[0])
        prompts.append(words.text[0])
        actions.append(after(torch.from_numpy(answer)[None]).numpy()[0])
    np.savez_compressed(
        folder / "vectors.npz", state=state, tasks=tasks, prompts=prompts, normalized_state=np.array(normalized),
        model_actions=model_actions, actions=np.array(actions),
    )  # fmt: skip


def write_images():
    rng = np.random.default_rng(0)
    arrays = {}
    for height, width in ((48, 64), (120, 250), (260, 90), (10, 9)):
        rows, columns = np.mgrid[0:height, 0:width]
        smooth = 128 + 100 * np.sin(rows / 7)[..., None] * np.cos(columns / 5)[..., None] * [1, 0.5, -0.7]
        image = np.clip(smooth + rng.integers(-9, 9, (height, width, 3)), 0, 255).astype(np.uint8)
        out = resize_with_pad_torch(torch.from_numpy(image).float()[None] / 255, 224, 224)[0].numpy()
        name = f"{height}x{width}"
        arrays[f"{name}/in"], arrays[f"{name}/fifths"] = image, out[::5, ::5]
        arrays[f"{name}/row"], arrays[f"{name}/column"] = out[112], out[:, 112]
    np.savez_compressed(HERE / "images.npz", **arrays)


QUANTILES = {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"}


def main():
    tokenizer_processor.AutoTokenizer = SimpleNamespace(from_pretrained=lambda name: Words())
    if sys.argv[1] == "0.4.4":
        write("pi05_old", "pi05", QUANTILES, cameras=["front"], state_dim=6, action_dim=6)
        return
    relative = {"use_relative_actions": True, "relative_exclude_joints": ["gripper", "wrist_roll"]}
    write_images()
    write(
        "pi05_renamed", "pi05", QUANTILES, cameras=["base_0_rgb", "left_wrist_0_rgb"], state_dim=8, action_dim=7,
        rename={"observation.images.front": "observation.images.base_0_rgb",
                "observation.image": "observation.images.left_wrist_0_rgb"},
        empty_cameras=1, num_inference_steps=5, tokenizer_max_length=120,
    )  # fmt: skip
    write(
        "pi05_relative", "pi05", {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MIN_MAX"},
        cameras=["wrist", "front"], state_dim=6, action_dim=6, action_feature_names=JOINTS, **relative,
    )  # fmt: skip
    write(
        "pi05_identity", "pi05", {"VISUAL": "IDENTITY", "STATE": "IDENTITY", "ACTION": "QUANTILE10"},
        cameras=["front"], state_dim=6, action_dim=6, **relative,
    )  # fmt: skip
    mean_std = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
    write("pi0", "pi0", mean_std, cameras=["front"], state_dim=6, action_dim=6)


if __name__ == "__main__":
    main()
