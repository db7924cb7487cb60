"""LeRobot's policy interface over a bundle."""

from __future__ import annotations

import logging
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from ki_edge.arguments import count
from ki_edge.errors import ArgumentError

from .configuration_ki_edge import NOT_TRAINED, KiEdgeConfig
from .observations import input_features, observations_of, output_features
from .opening import REMOTE, open_policy
from .overlapping import joining

logger = logging.getLogger(__name__)


class KiEdgePolicy(PreTrainedPolicy):
    """A bundle. It has no parameters: the engine of the bundle holds them.

    Batches are as LeRobot's processors give them, raw: pictures f32 [B, 3, h, w] from 0 to 1, `observation.state`
    f32 [B, s] and `task`; actions come in the robot's units.
    """

    config_class = KiEdgeConfig
    name = "ki_edge"
    type = "ki_edge"

    def __init__(self, config: KiEdgeConfig, **_: Any) -> None:
        """Open the bundle. Keywords that LeRobot passes (statistics of a dataset) are not needed."""
        super().__init__(config)
        self.runtime = open_policy(config)
        contract = self.runtime.contract
        config.input_features = input_features(contract, config.rename)
        config.output_features = output_features(contract)
        if contract.action_names is not None:
            config.action_feature_names = list(contract.action_names)
        asked = contract.execute if config.n_action_steps is None else config.n_action_steps
        self._execute = count(asked, "n_action_steps", contract.action_horizon)
        self.reset()

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path | None = None, *, config: PreTrainedConfig | None = None, **_: Any
    ) -> KiEdgePolicy:
        """The policy of a configuration, or of a folder that `save_pretrained` wrote."""
        if config is None:
            if pretrained_name_or_path is None:
                raise ArgumentError("from_pretrained: expected a folder, or a config with a bundle")
            config = PreTrainedConfig.from_pretrained(pretrained_name_or_path)
        if not isinstance(config, KiEdgeConfig):
            raise ArgumentError(f"{pretrained_name_or_path} is of the policy type {config.type}, not ki_edge")
        return cls(config).eval()

    def _save_pretrained(self, save_directory: Path, **_: Any) -> None:
        """The configuration alone, with the bundle's absolute path; the bundle is not copied."""
        if not self.config.bundle.startswith(REMOTE):
            self.config.bundle = str(Path(self.config.bundle).resolve())
        self.config._save_pretrained(save_directory)

    def reset(self) -> None:
        """Forget the actions that were not executed: an episode begins."""
        self._left: deque[Tensor] = deque()

    def supports_rtc(self) -> bool:
        """Whether the bundle was exported with real-time chunking."""
        if self.runtime.rtc is None:
            logger.warning("%s was exported without real-time chunking: export it with --rtc", self.config.bundle)
        return self.runtime.rtc is not None

    def select_action(self, batch: dict[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """The next action, f32 [B, a]; a new chunk is inferred when the last one's share was executed."""
        if not self._left:
            chunk = self.predict_action_chunk(batch, noise=noise)
            self._left.extend(chunk[:, : self._execute].transpose(0, 1))
        return self._left.popleft()

    @torch.compiler.disable
    def predict_action_chunk(
        self,
        batch: dict[str, Tensor],
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
        execution_horizon: int | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Actions f32 [B, H, a] in the robot's units.

        `noise` f32 [B, H, A], else drawn as LeRobot's policies draw it, from torch's generator. The others are of
        real-time chunking, see `overlapping.joining`. ObservationError and ArgumentError for what does not fit.
        """
        rows = observations_of(batch, self.runtime.contract, self.config.rename)
        joined = joining(self.runtime, prev_chunk_left_over, inference_delay, execution_horizon, self.config.rtc_config)
        if joined and len(rows) > 1:
            raise ArgumentError(f"prev_chunk_left_over: real-time chunking takes one robot, the batch has {len(rows)}")
        noises = self._noise(noise, len(rows))
        steps = self.config.num_steps
        chunks = [
            self.runtime.infer(row, noise=one, num_steps=steps, **joined)["actions"]
            for row, one in zip(rows, noises, strict=True)
        ]
        return torch.from_numpy(np.stack(chunks).astype(np.float32)).to(_device(batch))

    def _noise(self, given: Tensor | None, rows: int) -> np.ndarray:
        contract = self.runtime.contract
        shape = (rows, contract.action_horizon, contract.model_action_dim)
        if given is None:
            given = torch.normal(mean=0.0, std=1.0, size=shape, dtype=torch.float32)
        if tuple(given.shape) != shape:
            raise ArgumentError(f"noise: expected {list(shape)}, got {list(given.shape)}")
        return given.detach().cpu().numpy().astype(np.float32)

    def get_optim_params(self) -> dict[str, Any]:
        """NotImplementedError: a bundle is not trained."""
        raise NotImplementedError(NOT_TRAINED)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any] | None]:
        """NotImplementedError: a bundle is not trained."""
        raise NotImplementedError(NOT_TRAINED)


def _device(batch: dict[str, Any]) -> torch.device:
    """Where the batch lies, and its actions are wanted."""
    return next((value.device for value in batch.values() if isinstance(value, Tensor)), torch.device("cpu"))
