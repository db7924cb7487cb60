"""A checkpoint as a policy in PyTorch: the other side of every comparison with a bundle on a robot."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ki_edge.contract import PolicyContract
from ki_edge.errors import CheckpointError
from ki_edge.model import Checkpoint, Observation
from ki_edge.normalize import read_norm_stats
from ki_edge.prompt import PromptTokenizer
from ki_edge.transforms import InputPipeline, OutputPipeline


class ReferencePolicy:
    """Same observations, noise and pipelines as `ki_runtime.policy.Policy`; the model runs in PyTorch, float32.

    It takes a checkpoint folder of `ki-train`: weights, contract.json, assets/. CheckpointError if a part is missing.
    """

    def __init__(self, checkpoint: str | Path) -> None:
        folder = Path(checkpoint)
        parts = [folder / "contract.json", folder / "assets" / "tokenizer.model", folder / "assets" / "norm_stats.json"]
        for part in parts:
            if not part.is_file():
                raise CheckpointError(f"{folder} is no complete policy: {part.relative_to(folder)} is missing")
        self.contract = PolicyContract.load(parts[0])
        tokenizer = PromptTokenizer(parts[1], self.contract.prompt_format, self.contract.max_token_len)
        stats = read_norm_stats(parts[2])
        self._inputs = InputPipeline(self.contract, stats, tokenizer)
        self._outputs = OutputPipeline(self.contract, stats)
        self.model = Checkpoint.open(folder).load_model()

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
        )
        actions = self.model.sample_actions(
            batch,
            noise=None if noise is None else torch.from_numpy(np.asarray(noise, np.float32))[None],
            num_steps=num_steps or self.contract.num_steps,
            time_convention=self.contract.time_convention,
        )
        robot_actions = self._outputs(actions[0].numpy(), inputs.raw_state)
        return {"actions": robot_actions, "timing": {"total_ms": 1e3 * (time.perf_counter() - start)}}
