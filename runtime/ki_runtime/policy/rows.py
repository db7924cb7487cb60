"""Questions to a policy as rows of a batch: several robots' observations in one run of the model.

A row keeps its own noise, its own chunk before and its own prompt; what others in its batch have is masked for it, so
that its actions are those it would have got alone, to the rounding of float32.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.overlap import Overlap
from ki_edge.policy.chunking import Guiding, PreviousChunk, Way
from ki_edge.policy.transforms import ModelInputs, pad_last

from .sampler import Sampler

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Question:
    """What `Policy.infer` is given, as one of many; see there."""

    observation: Mapping[str, Any]
    noise: npt.ArrayLike | None = None
    seed: int | None = None
    num_steps: int | None = None
    previous: PreviousChunk | None = None
    way: Way | None = None
    guiding: Guiding | None = None


@dataclass(frozen=True, eq=False)
class Row:
    """A question as the model takes it. `noise` f32 [1, H, A]; `overlap`: of a batch of one."""

    inputs: ModelInputs
    noise: F32
    num_steps: int | None
    overlap: Overlap | None
    preprocess_ms: float

    @property
    def kind(self) -> Hashable:
        """Rows of one kind can run together: as many steps, the same cameras, pulled as strongly."""
        pull = None if self.overlap is None else (self.overlap.maximum,)
        return self.num_steps, self.inputs.camera_mask.tobytes(), self.inputs.images.shape, pull


def run_rows(sampler: Sampler, rows: Sequence[Row]) -> F32:
    """Actions f32 [B, H, A] of rows of one kind, in the model's space. Errors as of `Sampler.sample_actions`."""
    inputs = [row.inputs for row in rows]
    longest = max(len(one.prompt_tokens) for one in inputs)
    tokens = np.stack([np.pad(one.prompt_tokens, (0, longest - len(one.prompt_tokens))) for one in inputs])
    mask = np.arange(longest) < np.array([[len(one.prompt_tokens)] for one in inputs])
    config = sampler.config
    state = np.stack([pad_last(one.state, config.state_size).astype(np.float32) for one in inputs])
    return sampler.sample_actions(
        np.stack([one.images for one in inputs]),
        np.stack([one.camera_mask for one in inputs]),
        tokens,
        mask,
        state=state if config.has_state else None,
        noise=np.concatenate([row.noise for row in rows]),
        num_steps=rows[0].num_steps,
        overlap=_together([row.overlap for row in rows if row.overlap is not None]),
    )


def _together(overlaps: Sequence[Overlap]) -> Overlap | None:
    """Of rows of one kind: all have one, or none has."""
    if not overlaps:
        return None
    parts = ([getattr(one, name) for one in overlaps] for name in ("actions", "weights", "committed"))
    actions, weights, committed = (np.concatenate(part) for part in parts)
    return Overlap(actions, weights, committed, overlaps[0].maximum)
