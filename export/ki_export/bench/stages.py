"""The bundle's side: inputs of a case, one inference of it with the time of each stage, and the work in its graphs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge import graphs
from ki_edge.bundle import Bundle
from ki_edge.config import Pi05Config
from ki_edge.policy.contract import PolicyContract
from ki_edge.policy.images import model_pictures
from ki_edge.policy.transforms import read_images
from ki_runtime.backends.backend import SessionOptions
from ki_runtime.backends.registry import connect
from ki_runtime.policy.decode import Choices, FastStage
from ki_runtime.policy.embeddings import table_of
from ki_runtime.policy.prefix import PrefixStage, prepare_inputs
from ki_runtime.policy.sampler import Sampler

from .options import CAMERA_SLOTS, PADDED_PROMPT, Case
from .probe import black_observation
from .rounds import Contender
from .work import Work, count

F32 = npt.NDArray[np.float32]
Array = npt.NDArray[Any]
FORCED, DECODED = 3, 16  # FAST tokens: fed before the first one that is chosen, and chosen after it
NO_EOS = -1


@dataclass(frozen=True, eq=False)
class Inputs:
    """One observation as openpi pads it, N slots and T places in the prompt; what is absent is zeros, and black."""

    images: npt.NDArray[np.uint8 | np.float32]  # [1, N, h, w, 3] of the type of the model's pictures
    camera_mask: npt.NDArray[np.bool_]  # [1, N]
    prompt_tokens: npt.NDArray[np.int32]  # [1, T]
    prompt_mask: npt.NDArray[np.bool_]  # [1, T]
    state: F32 | None  # [1, A], for a π0 alone

    @property
    def arrays(self) -> tuple[Array, Array, Array, Array]:
        """In the order of the prefix graph."""
        return self.images, self.camera_mask, self.prompt_tokens, self.prompt_mask


@dataclass(frozen=True)
class Room:
    """What the policy has room for: camera slots, and places in the prompt."""

    slots: int
    padded: int


def room(bundle: Bundle) -> Room:
    """As its contract says, or openpi's three cameras and 200 tokens for a bundle of the model alone."""
    if bundle.manifest.contract is None:
        return Room(CAMERA_SLOTS, PADDED_PROMPT)
    contract = PolicyContract.from_json(bundle.manifest.contract)
    return Room(len(contract.cameras), contract.max_token_len)


def draw_inputs(config: Pi05Config, space: Room, case: Case) -> Inputs:
    """Noise in the first cameras and any tokens in the prompt; always the same ones."""
    rng, size = np.random.default_rng(0), config.vision.image_size
    present = np.arange(space.slots)[None] < case.cameras
    images = rng.integers(0, 256, (1, space.slots, size, size, 3), np.uint8) * present[:, :, None, None, None]
    prompt = np.arange(space.padded)[None] < case.tokens
    tokens = rng.integers(3, config.vocab_size, (1, space.padded)) * prompt
    state = np.zeros((1, config.state_size), np.float32) if config.has_state else None
    images = model_pictures(images.astype(np.uint8), config.pictures)
    return Inputs(images, present, tokens.astype(np.int32), prompt, state)


def draw_noise(config: Pi05Config) -> F32:
    """x at t = 1, f32 [1, H, A]."""
    return np.random.default_rng(1).standard_normal((1, config.action_horizon, config.action_dim), np.float32)


def bundle_contender(sampler: Sampler, inputs: Inputs, noise: F32, steps: int) -> Contender:
    """One inference from untrimmed inputs; checking and trimming them is part of the prefix's time."""

    def run() -> dict[str, float]:
        start = time.perf_counter()
        sampler.sample_actions(*inputs.arrays, state=inputs.state, noise=noise, num_steps=steps)
        total, denoise = 1e3 * (time.perf_counter() - start), sampler.timing.denoise / 1e6
        return {"prefix": total - denoise, "step": denoise / steps, "denoise": denoise, "total": total}

    return run


def fast_contender(bundle: Bundle, backend: str, threads: int, inputs: Inputs) -> Contender:
    """FAST decoding behind a prefix: the first token, and each one after it. Nothing ends a row."""
    opened = connect(bundle, backend, SessionOptions(threads))
    prefix_spec, _, fast_spec = graphs.specs(bundle.manifest.config, fast=True)
    table = table_of(bundle)
    prefix_stage, fast = PrefixStage(opened.open(prefix_spec), table), FastStage(opened.open(fast_spec), table)
    kept = prepare_inputs(*inputs.arrays, bundle.manifest.config)
    prefix = prefix_stage.run(kept)
    ids = bundle.manifest.vocabulary.ids
    choices = Choices.of(ids, NO_EOS)

    def decode(tokens: int) -> float:
        start = time.perf_counter()
        fast.run(prefix, kept, choices, tokens, ids[:1] * FORCED)
        return 1e3 * (time.perf_counter() - start)

    def run() -> dict[str, float]:
        first = decode(1)
        return {"first": first, "token": (decode(1 + DECODED) - first) / DECODED}

    return run


def resizing(contract: PolicyContract, size: tuple[int, int]) -> Contender:
    """A policy's pictures of this height and width to the model's. What they show does not matter for the time."""
    observation = black_observation(contract, size)

    def run() -> dict[str, float]:
        start = time.perf_counter()
        read_images(contract, observation)
        return {"total": 1e3 * (time.perf_counter() - start)}

    return run


class Works:
    """The work of a bundle's graphs, counted once for each size."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        manifest = bundle.manifest
        self._sizes = graphs.sizes(manifest.config, len(manifest.vocabulary.ids))
        self._prefix, self._denoise, self._fast = graphs.specs(manifest.config, fast=True)
        self._found: dict[tuple[object, ...], Work] = {}

    def prefix(self, case: Case) -> Work:
        """One run of the prefix graph on what the runtime keeps of the case's inputs."""
        return self._count(self._prefix, {"N": case.cameras, "T": case.tokens, "S": self.tokens(case)})

    def step(self, case: Case) -> Work:
        """One denoising step."""
        return self._count(self._denoise, {"S": self.tokens(case)})

    def fast(self, case: Case, new: int) -> Work:
        """One run of the decode graph that is fed `new` tokens; the cache is what `fast_contender` ends with."""
        length = self.tokens(case) + FORCED + 1 + (DECODED if new == 1 else 0)
        return self._count(self._fast, {"Q": new, "C": length})

    def tokens(self, case: Case) -> int:
        """Prefix tokens of a case (S)."""
        return case.cameras * self._sizes["P"] + case.tokens

    def _count(self, spec: graphs.GraphSpec, free: Mapping[str, int]) -> Work:
        key = (spec.name, *free.values())
        if key not in self._found:
            self._found[key] = count(self._bundle.graph(spec.name), spec, {**self._sizes, "B": 1, **free})
        return self._found[key]
