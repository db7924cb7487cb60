"""What the model sees: a batch of pictures and prompts, and in training the FAST postfix as a field of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ki_edge.config import Pi05Config
from ki_edge.errors import ObservationError


@dataclass(frozen=True)
class Observation:
    """One batch.

    images         u8 [B,N,h,w,3], RGB, cameras in the contract's order; or f32 in [-1, 1] (a margin may be -3)
    camera_mask    bool [B,N], False where a camera is absent
    prompt_tokens  int [B,T], left-aligned, text only: never FAST tokens
    prompt_mask    bool [B,T]
    fast_tokens    int [B,F], the whole postfix from "Action: " to <eos>, left-aligned; None outside training
    fast_mask      bool [B,F]
    state          f32 [B,Z], for a π0 alone: normalised, zeros past the robot's numbers
    """

    images: Tensor
    camera_mask: Tensor
    prompt_tokens: Tensor
    prompt_mask: Tensor
    fast_tokens: Tensor | None = None
    fast_mask: Tensor | None = None
    state: Tensor | None = None

    def check(self, config: Pi05Config) -> None:
        """ObservationError unless shapes and types fit each other and the model."""
        size, images = config.vision.image_size, self.images
        types = (torch.uint8, torch.float32)
        if images.ndim != 5 or images.dtype not in types or tuple(images.shape[2:]) != (size, size, 3):
            raise ObservationError(
                f"images: {images.dtype} {list(images.shape)}, expected torch.uint8 [B, N, {size}, {size}, 3], "
                "or torch.float32 in [-1, 1]"
            )
        batch, cameras = images.shape[:2]
        _expect("camera_mask", self.camera_mask, (batch, cameras))
        _expect("prompt_mask", self.prompt_mask, (batch, self.prompt_tokens.shape[-1]))
        if self.prompt_tokens.shape != self.prompt_mask.shape:
            raise ObservationError(f"prompt_tokens {list(self.prompt_tokens.shape)} and its mask differ in shape")
        if (self.fast_tokens is None) != (self.fast_mask is None):
            raise ObservationError("fast_tokens and fast_mask: give both or neither")
        if self.fast_tokens is not None and self.fast_mask is not None:
            _expect("fast_mask", self.fast_mask, (batch, self.fast_tokens.shape[-1]))
            if not self.fast_tokens.shape[-1]:
                raise ObservationError("fast_tokens: no token at all, expected a postfix or None")
        self._check_state(config, (batch, config.state_size))

    def _check_state(self, config: Pi05Config, shape: tuple[int, int]) -> None:
        if not config.has_state:
            if self.state is not None:
                raise ObservationError("state: this π0.5 reads the state in its prompt: leave it out")
            return
        if self.state is None:
            raise ObservationError(f"state: missing, expected torch.float32 {list(shape)}: a π0 takes it as a tensor")
        if self.state.dtype != torch.float32 or tuple(self.state.shape) != shape:
            raise ObservationError(
                f"state: {self.state.dtype} {list(self.state.shape)}, expected torch.float32 {list(shape)}"
            )


def _expect(name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool or tuple(mask.shape) != shape:
        raise ObservationError(f"{name}: {mask.dtype} {list(mask.shape)}, expected torch.bool {list(shape)}")
