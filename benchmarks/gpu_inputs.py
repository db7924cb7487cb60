"""Observations of the GPU benchmark: the same ones for every contender, whatever process draws them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.config import Pi05Config
from ki_edge.policy.images import model_pictures

Array = npt.NDArray[Any]
SLOTS, PADDED = 3, 200  # openpi's cameras and prompt length
BLOCKS = 8


@dataclass(frozen=True)
class Case:
    """`cameras` present of three and `tokens` of the prompt's 200 places.

    `batch` rows at once: every second one has the last cameras instead of the first, and half of the tokens.
    """

    cameras: int
    tokens: int
    steps: int
    seed: int = 0
    batch: int = 1


@dataclass(frozen=True, eq=False)
class Observation:
    """As openpi pads it, zeros where nothing is; noise f32 [B, H, A]; state f32 [B, A] for a π0, else None."""

    images: Array  # [B, N, h, w, 3] of the type of the model's pictures
    camera_mask: Array  # bool [B, N]
    prompt_tokens: Array  # i32 [B, T]
    prompt_mask: Array  # bool [B, T]
    state: Array | None
    noise: Array

    @property
    def arrays(self) -> tuple[Array, Array, Array, Array]:
        """In the order of the prefix graph."""
        return self.images, self.camera_mask, self.prompt_tokens, self.prompt_mask

    def trimmed(self) -> Observation:
        """Without what is absent; of one row."""
        present, tokens = self.camera_mask[0], self.prompt_mask[0]
        return Observation(
            self.images[:, present],
            self.camera_mask[:, present],
            self.prompt_tokens[:, tokens],
            self.prompt_mask[:, tokens],
            self.state,
            self.noise,
        )


def draw(config: Pi05Config, case: Case) -> Observation:
    """Coloured blocks under noise, and any tokens."""
    rng, size = np.random.default_rng(case.seed), config.vision.image_size
    rows = np.arange(case.batch)[:, None]
    slots = np.where(rows % 2, np.arange(SLOTS)[::-1], np.arange(SLOTS))
    present = slots < case.cameras
    prompt = np.arange(PADDED)[None] < np.where(rows % 2, -(-case.tokens // 2), case.tokens)
    cells = -(-size // BLOCKS)
    blocks = rng.integers(0, 256, (case.batch, SLOTS, BLOCKS, BLOCKS, 3)).repeat(cells, axis=2).repeat(cells, axis=3)
    pictures = np.clip(blocks[:, :, :size, :size] + rng.integers(-40, 41, (case.batch, SLOTS, size, size, 3)), 0, 255)
    tokens = rng.integers(3, config.vocab_size, (case.batch, PADDED)) * prompt
    shape = (case.batch, config.action_horizon, config.action_dim)
    state = rng.standard_normal((case.batch, config.action_dim), np.float32) if config.has_state else None
    images = model_pictures(np.asarray(pictures * present[:, :, None, None, None], np.uint8), config.pictures)
    noise = rng.standard_normal(shape, np.float32)
    return Observation(images, present, tokens.astype(np.int32), prompt, state, noise)
