"""AdamW over groups of parameters, with moments in float32 or in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ki_edge.errors import ArgumentError
from ki_edge.planning.settings import TrainSettings

from .groups import group_of
from .processes import Processes
from .sharding import local

STEP = "step"  # of a parameter's moments: how many steps they have seen
CODES = ("qmap1", "qmap2")  # what bytes stand for: constants, shared by all parameters


class Optimizer:
    """AdamW of the settings; decay on matrices only, rates by group.

    In 8 bits (bitsandbytes: blocks of 256 values with a scale of their own) a process steps its shards as if they were
    all there is, so the moments of shards belong to as many processes as they were made by.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: TrainSettings, processes: Processes) -> None:
        self.parameters, self.settings = dict(parameters), settings
        self._stepped, self._owner = self.parameters, ""
        if settings.optimizer == "adamw8bit" and any(isinstance(p, DTensor) for p in parameters.values()):
            self._stepped = {name: nn.Parameter(local(value)) for name, value in parameters.items()}
            self._owner = f"{processes.rank}of{processes.world}."
        groups = _groups(self._stepped, dict(settings.rates), settings.weight_decay)
        rate, betas = settings.learning_rate, (settings.beta1, settings.beta2)
        self._adam: torch.optim.Optimizer
        if settings.optimizer == "adamw8bit":
            self._adam = _eight_bits()(groups, lr=rate, betas=betas)
        else:
            self._adam = torch.optim.AdamW(groups, lr=rate, betas=betas, fused=processes.device.type == "cuda")

    def step(self, rate: float) -> None:
        """Apply the gradients at this learning rate."""
        for group in self._adam.param_groups:
            group["lr"] = rate * group["factor"]
        for name, stepped in self._stepped.items():
            gradient = self.parameters[name].grad
            if stepped is not self.parameters[name] and gradient is not None:
                stepped.grad = local(gradient)
        self._adam.step()

    def clear(self) -> None:
        """Forget the gradients."""
        for parameter in (*self.parameters.values(), *self._stepped.values()):
            parameter.grad = None

    def tensors(self, step: int) -> dict[str, Tensor]:
        """The moments themselves, to be saved or read into, by names; at `step`, if there are none yet."""
        if not self._adam.state:
            self._make_moments()
            self.count(step)
        found = {}
        for name, parameter in self._stepped.items():
            for part, value in self._adam.state[parameter].items():
                if part != STEP and part not in CODES and isinstance(value, Tensor):
                    found[f"{self._owner}{name}.{part}"] = value
        return found

    def count(self, step: int) -> None:
        """Let the moments be those after `step` steps."""
        for moments in self._adam.state.values():
            if isinstance(moments[STEP], Tensor):
                moments[STEP].fill_(step)
            else:
                moments[STEP] = step

    def _make_moments(self) -> None:
        """All zero: a step of rate zero without gradients, which changes no weight."""
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        self.step(0.0)
        self.clear()


def _groups(
    parameters: Mapping[str, nn.Parameter], factors: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """`factor`: of the learning rate."""
    found: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        found.setdefault((group_of(name), parameter.ndim >= 2), []).append(parameter)
    return [
        {"params": members, "weight_decay": weight_decay if matrix else 0.0, "factor": factors.get(group, 1.0)}
        for (group, matrix), members in found.items()
    ]


def _eight_bits() -> Any:
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError:
        raise ArgumentError("optimizer adamw8bit: needs bitsandbytes: pip install 'ki-edge[adamw8bit]'") from None
    return AdamW8bit
