"""Observations that a verification feeds to both sides: what is absent, short, full-length and batched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.config import Pi05Config
from ki_edge.overlap import Overlap, prefix_weights
from ki_edge.policy.images import LOWEST, model_pictures

Array = npt.NDArray[Any]
SHORT = 9  # tokens of a short prompt
CONTINUED_STEPS = 3
CONTINUING = ", continuing a chunk"  # at the end of a case's name


@dataclass(frozen=True, eq=False)
class Case:
    """One batch of inputs. `forced` and `max_tokens` are for greedy FAST decoding."""

    name: str
    images: Array  # u8 [B,N,h,w,3]; f32 in [-3,1] for a model whose pictures are float32
    camera_mask: Array  # bool [B,N]
    prompt_tokens: Array  # i64 [B,T]
    prompt_mask: Array  # bool [B,T]
    noise: Array  # f32 [B,H,A]
    num_steps: int
    forced: tuple[int, ...] = ()
    max_tokens: int = 6
    state: Array | None = None  # f32 [B,A], of a π0
    overlap: Overlap | None = None  # the chunks before

    @property
    def inputs(self) -> tuple[Array, Array, Array, Array]:
        """The prefix graph's inputs in their order."""
        return self.images, self.camera_mask, self.prompt_tokens, self.prompt_mask

    def describe(self) -> dict[str, Any]:
        """For the report."""
        return {
            "name": self.name,
            "batch": len(self.images),
            "cameras": self.camera_mask.sum(axis=1).tolist(),
            "prompt_tokens": self.prompt_mask.sum(axis=1).tolist(),
            "num_steps": self.num_steps,
            "fast_tokens": self.max_tokens,
        }


def standard_cases(
    config: Pi05Config, *, cameras: int, max_prompt: int, num_steps: int, forced: tuple[int, ...]
) -> list[Case]:
    """Four batches with seeds 0 to 3; at least two camera slots, so that one can be absent."""
    slots, short = max(2, cameras), min(SHORT, max_prompt)
    everything, without_last = [True] * slots, [True] * (slots - 1) + [False]
    without_first = [False] + [True] * (slots - 1)
    plans: Sequence[tuple[str, list[list[bool]], list[int]]] = (
        ("all cameras, short prompt", [everything], [short]),
        ("absent camera, full-length prompt", [without_last], [max_prompt]),
        ("first camera absent, prompt of one token", [without_first], [1]),
        ("batch of two, unlike each other", [everything, without_last], [short, max_prompt]),
    )
    return [
        _draw(config, name, seed, np.array(mask), lengths, num_steps, forced)
        for seed, (name, mask, lengths) in enumerate(plans)
    ]


def compact_cases(config: Pi05Config, *, cameras: int, num_steps: int, forced: tuple[int, ...]) -> list[Case]:
    """One batch with everything that a graph distinguishes: cameras and an absent one, a short prompt and padding.

    For models whose every token costs seconds. Two sampled tokens run the FAST graph with several new tokens, then one.
    """
    slots = max(2, cameras)
    mask = np.array([[True] * (slots - 1) + [False]])
    case = _draw(config, "absent camera, short prompt", 0, mask, [SHORT], num_steps, forced)
    return [replace(case, max_tokens=2)]


def continuing(config: Pi05Config, case: Case) -> Case:
    """A case with fewer steps whose chunks continue others, in every way that the model's denoise graph knows."""
    batch, horizon, _ = case.noise.shape
    delay = min(2, horizon - 1)
    weights = prefix_weights(delay, max(delay, horizon - 1), horizon)
    overlap = Overlap(
        actions=np.random.default_rng(5).uniform(-1, 1, case.noise.shape).astype(np.float32),
        weights=np.tile(weights, (batch, 1)),
        committed=np.tile((np.arange(horizon) < delay) & (config.rtc == "trained"), (batch, 1)),
    )
    return replace(case, name=case.name + CONTINUING, num_steps=min(case.num_steps, CONTINUED_STEPS), overlap=overlap)


def engine_cases(cases: Sequence[Case], *, cameras: int, max_prompt: int) -> list[Case]:
    """Those cases that an engine takes which was built for one observation, so many cameras and so long a prompt."""
    found = []
    for case in cases:
        kept = np.ones(case.camera_mask.shape[1], np.bool_)
        if kept.size > cameras:  # the slot that was added so that a camera can be absent
            kept = case.camera_mask[0]
        if len(case.images) == 1 and kept.sum() <= cameras:
            tokens, mask = case.prompt_tokens[:, :max_prompt], case.prompt_mask[:, :max_prompt]
            images, camera_mask = case.images[:, kept], case.camera_mask[:, kept]
            found.append(replace(case, images=images, camera_mask=camera_mask, prompt_tokens=tokens, prompt_mask=mask))
    return found


def twin(config: Pi05Config, case: Case) -> Case:
    """Other content in the shapes of a case of one observation: what a record that is replayed must not confuse."""
    length = int(case.prompt_mask.sum())
    return _draw(config, "other content", 4, case.camera_mask, [length], case.num_steps, case.forced)


def compact_companions(config: Pi05Config, case: Case, *, cameras: int, max_prompt: int) -> Case:
    """In one batch, so that each layer is read once: a compact case's twin, and all cameras with a full prompt."""
    slots = case.camera_mask.shape[1]
    masks = np.concatenate([case.camera_mask, np.arange(slots)[None] < cameras])
    lengths = [int(case.prompt_mask.sum()), max_prompt]
    return _draw(config, "other content, and full-length prompt", 4, masks, lengths, case.num_steps, case.forced)


def _draw(
    config: Pi05Config, name: str, seed: int, mask: Array, lengths: list[int], num_steps: int, forced: tuple[int, ...]
) -> Case:
    rng = np.random.default_rng(seed)
    batch, slots = mask.shape
    # padded by three columns, so that padding inside a batch of one is tested too
    prompt_mask = np.arange(max(lengths) + 3) < np.array(lengths)[:, None]
    tokens = np.where(prompt_mask, rng.integers(2, config.vocab_size, prompt_mask.shape), 0)
    return Case(
        name=f"seed {seed}: {name}",
        images=_pictures(rng, (batch, slots), config),
        camera_mask=mask,
        prompt_tokens=tokens,
        prompt_mask=prompt_mask,
        noise=rng.standard_normal((batch, config.action_horizon, config.action_dim), np.float32),
        num_steps=num_steps,
        forced=forced,
        state=rng.standard_normal((batch, config.state_size), np.float32) if config.has_state else None,
    )


def _pictures(rng: np.random.Generator, shape: tuple[int, int], config: Pi05Config) -> Array:
    """Coloured blocks under noise [B,N,h,w,3]: flat regions and fine detail; float ones in the widest margin."""
    size = config.vision.image_size
    cells = -(-size // 8)
    blocks = rng.integers(0, 256, (*shape, 8, 8, 3)).repeat(cells, axis=2).repeat(cells, axis=3)
    noise = rng.integers(-40, 41, (*shape, size, size, 3))
    images = model_pictures(np.asarray(np.clip(blocks[:, :, :size, :size] + noise, 0, 255), np.uint8), config.pictures)
    if config.pictures == "float32":
        images[:, :, : size // 8] = images[:, :, -(size // 8) :] = LOWEST
    return images
