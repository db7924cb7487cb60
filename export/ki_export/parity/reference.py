"""A checkpoint as a policy in PyTorch: the other side of every comparison with a bundle on a robot."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ki_edge.model import Observation, load_model
from ki_edge.policy.transforms import InputPipeline, ModelInputs, OutputPipeline, pad_last
from ki_export.policies import PolicyRequest
from ki_export.source.examination import examine
from ki_export.source.opening import CheckpointRef


class ReferencePolicy:
    """Same observations, noise and pipelines as `ki_runtime.policy.policy.Policy`; the model runs in PyTorch, float32.

    It takes a checkpoint of any format; `request` gives what it does not record. CheckpointError if a part is missing.
    """

    def __init__(self, checkpoint: str | Path | CheckpointRef, request: PolicyRequest | None = None) -> None:
        where = checkpoint if isinstance(checkpoint, CheckpointRef) else CheckpointRef(str(checkpoint))
        examined = examine(where, request or PolicyRequest())
        opened, files = examined.checkpoint, examined.files()
        assert files is not None  # None is for the model alone
        self.contract, self.stats = files.contract, files.stats  # a loop takes its limits from the statistics
        self._inputs = InputPipeline(files.contract, files.stats, files.tokenizer)
        self._outputs = OutputPipeline(files.contract, files.stats)
        self.model = load_model(opened)

    def infer(
        self, observation: Mapping[str, Any], *, noise: npt.ArrayLike | None = None, num_steps: int | None = None
    ) -> dict[str, Any]:
        """{"actions": float64 [H, a] in robot units, "timing": {"total_ms"}}; noise f32 [H,A]."""
        start = time.perf_counter()
        inputs = self._inputs(observation)
        batch = Observation(
            images=torch.from_numpy(inputs.images)[None],
            camera_mask=torch.from_numpy(inputs.camera_mask)[None],
            prompt_tokens=torch.from_numpy(inputs.prompt_tokens)[None],
            prompt_mask=torch.ones(1, len(inputs.prompt_tokens), dtype=torch.bool),
            state=self._state(inputs),
        )
        actions = self.model.sample_actions(
            batch,
            noise=None if noise is None else torch.from_numpy(np.asarray(noise, np.float32))[None],
            num_steps=num_steps or self.contract.num_steps,
            time_convention=self.contract.time_convention,
        )
        robot_actions = self._outputs(actions[0].numpy(), inputs.raw_state)
        return {"actions": robot_actions, "timing": {"total_ms": 1e3 * (time.perf_counter() - start)}}

    def _state(self, inputs: ModelInputs) -> torch.Tensor | None:
        """The state as a tensor f32 [1,A] for a π0; a π0.5 has it in its prompt."""
        config = self.model.config
        return torch.from_numpy(pad_last(inputs.state, config.state_size)).float()[None] if config.has_state else None
