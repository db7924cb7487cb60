"""Golden runs of the reference systems, and a small model whose every parameter matters."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch

from ki_edge.config import GemmaConfig, Pi05Config, VisionConfig
from ki_edge.model import Observation, Pi05, load_model

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
SMALL = Pi05Config(
    vision=VisionConfig(width=16, depth=2, mlp_dim=24, num_heads=2, patch_size=7, image_size=14),
    backbone=GemmaConfig(width=24, depth=3, mlp_dim=40, num_heads=4, num_kv_heads=2, head_dim=8),
    expert=GemmaConfig(width=16, depth=3, mlp_dim=24, num_heads=4, num_kv_heads=2, head_dim=8),
    vocab_size=96,
    action_dim=6,
    action_horizon=5,
)


@dataclass(frozen=True, eq=False)
class Golden:
    """One folder of golden data: the model that made it, what went in and what came out."""

    model: Pi05
    inputs: dict
    outputs: dict
    observation: Observation


@pytest.fixture(scope="session")
def golden(data):
    """golden(folder) -> Golden; models are loaded once, so tests must not change them."""

    @cache
    def load(name):
        inputs, outputs = (dict(np.load(data / name / f"{what}.npz")) for what in ("inputs", "outputs"))
        postfix = {}
        if "token_loss_mask" in inputs:
            rows = [row[mask] for row, mask in zip(inputs["tokenized_prompt"], inputs["token_loss_mask"], strict=True)]
            mask = np.arange(max(map(len, rows))) < np.array([[len(row)] for row in rows])
            tokens = np.zeros(mask.shape, np.int64)
            tokens[mask] = np.concatenate(rows)
            postfix = {"fast_tokens": torch.from_numpy(tokens), "fast_mask": torch.from_numpy(mask)}
        text = ("prompt_only_tokens", "prompt_only_mask") if postfix else ("tokenized_prompt", "tokenized_prompt_mask")
        observation = Observation(
            images=torch.from_numpy(np.stack([inputs[f"image/{camera}"] for camera in CAMERAS], axis=1)),
            camera_mask=torch.from_numpy(np.stack([inputs[f"image_mask/{camera}"] for camera in CAMERAS], axis=1)),
            prompt_tokens=torch.from_numpy(inputs[text[0]]),
            prompt_mask=torch.from_numpy(inputs[text[1]]),
            **postfix,
        )
        return Golden(load_model(data / name), inputs, outputs, observation)

    return load


@pytest.fixture
def small_model():
    """A fresh model with two K/V heads and random values everywhere, norms and biases included."""
    generator = torch.Generator().manual_seed(0)
    model = Pi05(SMALL).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.normal_(0.0, scale, generator=generator)
        model.backbone.embed_tokens.weight.mul_(0.3)  # else every token predicts itself
    return model


@pytest.fixture
def observe():
    """observe(cameras=[[True, ...], ...], prompts=[count, ...], fast=[count, ...]) -> Observation of random content.

    Also what is masked is random: pictures of absent cameras and padding tokens are not zeros.
    """

    def make(cameras, prompts, fast=None, *, config=SMALL, seed=1):
        random = np.random.default_rng(seed)
        size = config.vision.image_size

        def rows(counts):
            mask = np.arange(max(counts)) < np.array(counts)[:, None]
            return torch.from_numpy(random.integers(2, config.vocab_size, mask.shape)), torch.from_numpy(mask)

        images = torch.from_numpy(random.integers(0, 256, (*np.shape(cameras), size, size, 3), np.uint8))
        return Observation(images, torch.tensor(cameras), *rows(prompts), *(rows(fast) if fast else ()))

    return make
