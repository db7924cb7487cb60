"""What a policy's first inferences will need, prepared before the robot moves.

Memory is allocated, and on a GPU kernels are compiled and CUDA graphs recorded, when a shape is first met. The contract
tells which shapes are likely: the cameras that must be there and those that may be, and a prompt whose length changes
only with the numbers of the state in it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge import graphs
from ki_edge.policy.contract import PolicyContract
from ki_edge.policy.keys import under_contract_keys
from ki_edge.policy.prompt import PromptTokenizer
from ki_edge.policy.transforms import state_of_prompt
from ki_runtime.backends.session import Bucket

from .sampler import Sampler

SOME_PROMPT = "pick up the object and put it into the box"  # of a usual length, where none is known
GREY = 128
TIMED = 3  # inferences, the median of which counts: one alone may meet a busy machine


@dataclass(frozen=True)
class Prepared:
    """What was prepared: how many cameras, and how many tokens of a prompt, the next inferences may have.

    A prompt of another length is padded to one of these where the engine pads.
    """

    cameras: tuple[int, ...]
    prompt_tokens: tuple[int, ...]
    num_steps: int
    fast: bool
    milliseconds: float
    inference_ms: float  # one of the largest, once all was prepared


def warm_up(
    sampler: Sampler,
    contract: PolicyContract,
    tokenizer: PromptTokenizer,
    *,
    prompt: str | None = None,
    num_steps: int | None = None,
    fast: bool = False,
) -> Prepared:
    """Run every likely shape once; see `Policy.warm_up`."""
    start = time.perf_counter()
    known = contract.default_prompt if prompt is None else prompt
    tokens = likely_tokens(contract, tokenizer, SOME_PROMPT if known is None else known)
    counts = prompt_lengths(tokens, sampler.prompt_bucket, contract.max_token_len, sure=known is not None)
    masks = likely_cameras(contract)
    state = np.zeros((1, sampler.config.state_size), np.float32) if sampler.config.has_state else None
    for mask in masks:
        for count in counts:  # the longest first: what it allocates serves the others
            inputs = _inputs(sampler, mask, np.resize(tokens[-1], count))
            sampler.sample_actions(*inputs, state=state, seed=0, num_steps=num_steps)
            if fast and contract.fast is not None:
                forced = tokenizer.action_ids
                sampler.sample_fast_tokens(*inputs, max_tokens=contract.fast.room(len(forced)), forced=forced)
    inputs = _inputs(sampler, masks[0], np.resize(tokens[-1], counts[0]))  # the largest
    took = []
    for _ in range(TIMED):
        begun = time.perf_counter()
        sampler.sample_actions(*inputs, state=state, seed=0, num_steps=num_steps)
        took.append(1e3 * (time.perf_counter() - begun))
    steps = sampler.num_steps if num_steps is None else num_steps
    seen = tuple(int(mask.sum()) for mask in masks)
    return Prepared(seen, counts, steps, fast, 1e3 * (time.perf_counter() - start), float(np.median(took)))


def likely_cameras(contract: PolicyContract) -> list[npt.NDArray[np.bool_]]:
    """Which of the contract's slots have a picture, bool [N]: all that can have one, and only those that must."""
    every = np.array([camera.key is not None for camera in contract.cameras])
    required = np.array([camera.key is not None and camera.required for camera in contract.cameras])
    return [every] if (every == required).all() or not required.any() else [every, required]


def likely_tokens(contract: PolicyContract, tokenizer: PromptTokenizer, prompt: str) -> list[npt.NDArray[np.int32]]:
    """The prompt with states from one end of the normalised range to the other, the shortest first."""
    if not tokenizer.uses_state:
        return [tokenizer.encode(prompt)]
    states: list[npt.NDArray[np.float64]]
    states = [np.full(contract.state_dim, end) for end in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    return sorted((tokenizer.encode(prompt, state_of_prompt(contract, state)) for state in states), key=len)


def prompt_lengths(tokens: list[npt.NDArray[np.int32]], bucket: Bucket, longest: int, *, sure: bool) -> tuple[int, ...]:
    """The lengths that the engine will meet, the longest first; where it pads to no bucket, only that one.

    `sure`: the prompt is the one that will be used; else a bucket more on either side.
    """
    least, most = len(tokens[0]), len(tokens[-1])
    if bucket.step == 1:
        return (most,)
    margin = 0 if sure else bucket.step
    counts = range(max(1, least - margin), min(most + margin, longest) + 1)
    return tuple(sorted({min(bucket.fit(count), longest) for count in counts}, reverse=True))


def blank_observation(contract: PolicyContract, prompt: str | None = None) -> Mapping[str, Any]:
    """An observation of this contract in which nothing is to be seen: grey pictures, a state of zeros."""
    height, width = contract.image_size
    picture = np.full((height, width, 3), GREY, np.uint8)
    pictures = {f"observation.images.{camera.key}": picture for camera in contract.cameras if camera.key is not None}
    state = np.zeros(contract.state_dim, np.float32)
    said = prompt or contract.default_prompt or SOME_PROMPT
    return under_contract_keys(contract, {**pictures, "observation.state": state, "prompt": said})


def _inputs(
    sampler: Sampler, mask: npt.NDArray[np.bool_], tokens: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.generic], ...]:
    """A sampler's four inputs: grey pictures."""
    size = sampler.config.vision.image_size
    pixel = np.dtype(graphs.specs(sampler.config)[0].tensor("images").dtype)
    images = np.full((1, len(mask), size, size, 3), GREY if pixel == np.uint8 else 0, pixel)
    return images, mask[None], tokens[None], np.ones((1, len(tokens)), np.bool_)
