"""Small recorded demonstrations, and a model small enough to train in a test."""

import json

import numpy as np
import pytest

from ki_edge.config import GemmaConfig, Pi05Config, VisionConfig


@pytest.fixture(scope="session")
def small_config():
    """Widths and depths; vocabulary and horizon follow from the demonstrations."""
    return Pi05Config(
        vision=VisionConfig(width=16, depth=1, mlp_dim=16, num_heads=2, patch_size=4, image_size=8),
        backbone=GemmaConfig(width=24, depth=2, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8),
        expert=GemmaConfig(width=16, depth=2, mlp_dim=24, num_heads=2, num_kv_heads=1, head_dim=8),
        vocab_size=64,
        action_dim=4,
        action_horizon=1,
    )


def record_demonstrations(folder, *, frames=12, size=8, seed=0):
    """Two cameras, three state and action numbers, chunks of four that follow the state; the last two frames do not
    show the target in both pictures."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    state = random.uniform(-2.0, 2.0, (frames, 3)).astype(np.float32)
    ramp = np.linspace(0.5, 1.0, 4, dtype=np.float32)[None, :, None]
    points = random.uniform(0.0, 1.0, (frames, 2, 2)).astype(np.float32)
    points[-1, 0] = np.nan
    points[-2, 1, 0] = 1.0
    arrays = {
        "images": random.integers(0, 256, (frames, 2, size, size, 3), np.uint8),
        "state": state,
        "actions": ramp * state[:, None] + np.float32(0.25),
        "prompt": (np.arange(frames) % 2).astype(np.int32),
        "points": points,
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    meta = {
        "version": 1,
        "cameras": ["top", "hand"],
        "state_names": ["x", "y", "z"],
        "action_names": ["dx", "dy", "dz"],
        "horizon": 4,
        "frames": frames,
        "control_hz": 25,
        "prompts": ["Reach the red target", "go home"],
        "robot": "test",
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="session")
def record():
    """record(folder, frames=12, size=8, seed=0) -> folder of new demonstrations."""
    return record_demonstrations


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory):
    """Twelve frames that tests share and must not change."""
    return record_demonstrations(tmp_path_factory.mktemp("train") / "demonstrations")
