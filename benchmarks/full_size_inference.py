"""One side of `full_size.py`: an inference of a full-size model, its actions saved; times as one line.

    python benchmarks/full_size_inference.py torch CHECKPOINT ACTIONS.npy
    python benchmarks/full_size_inference.py bundle BUNDLE ACTIONS.npy

Two of three cameras present, a prompt of 30 tokens, 10 steps.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

CAMERAS, SLOTS, PROMPT, STEPS = 2, 3, 30, 10


def inputs(size: int, vocabulary: int, horizon: int, dim: int) -> tuple[tuple[Any, ...], Any]:
    """The prefix graph's inputs and the noise, from a fixed seed."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (1, SLOTS, size, size, 3), dtype=np.uint8)
    mask = np.arange(SLOTS)[None] < CAMERAS
    tokens = rng.integers(2, vocabulary, (1, PROMPT))
    return (images, mask, tokens, np.ones((1, PROMPT), np.bool_)), rng.standard_normal((1, horizon, dim), np.float32)


def of_torch(path: Path) -> tuple[Any, str]:
    """Actions of the PyTorch model in float32, its layers read as they run."""
    import torch

    from ki_edge.checkpoints import Checkpoint
    from ki_edge.model import Observation
    from ki_edge.model.streaming import streamed

    checkpoint = Checkpoint.open(path)
    config = checkpoint.config
    model = streamed(checkpoint)
    given, noise = inputs(config.vision.image_size, config.vocab_size, config.action_horizon, config.action_dim)
    observation = Observation(*map(torch.from_numpy, given))
    start = time.perf_counter()
    with torch.inference_mode():
        actions = model.sample_actions(observation, noise=torch.from_numpy(noise), num_steps=STEPS)
    return actions.numpy(), f"inference {time.perf_counter() - start:.1f} s"


def of_bundle(path: Path) -> tuple[Any, str]:
    """Actions of the runtime; the second inference is timed by stage."""
    from ki_runtime import Sampler

    start = time.perf_counter()
    sampler = Sampler.open(path)
    loaded = time.perf_counter() - start
    config = sampler.config
    given, noise = inputs(config.vision.image_size, config.vocab_size, config.action_horizon, config.action_dim)
    start = time.perf_counter()
    sampler.sample_actions(*given, noise=noise, num_steps=STEPS)
    first = time.perf_counter() - start
    actions = sampler.sample_actions(*given, noise=noise, num_steps=STEPS)
    prefix, denoise = sampler.timing.prefix / 1e9, sampler.timing.denoise / 1e9
    return actions, f"load {loaded:.1f} s, first inference {first:.1f} s, then {prefix:.1f} + {denoise:.1f} s"


def main() -> None:
    """Run, save, tell."""
    side, path, output = sys.argv[1:]
    actions, times = {"torch": of_torch, "bundle": of_bundle}[side](Path(path))
    np.save(output, actions)
    print(times)


if __name__ == "__main__":
    main()
