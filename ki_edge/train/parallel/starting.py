"""The weights that a run starts from, read into their places: each process its own rows, no model is held twice."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from ki_edge.checkpoints import Checkpoint
from ki_edge.checkpoints.layout.keys import checkpoint_key
from ki_edge.config import Pi05Config
from ki_edge.errors import ArgumentError, CheckpointError
from ki_edge.model import Pi05

from .adapters import module_of, plain_name
from .processes import Processes
from .sharding import first_row, local

PIECE = 1 << 22  # elements that are read at once
OF_DATA = ("action_horizon", "rtc", "pictures")  # no weight depends on them
F32 = npt.NDArray[np.float32]


class Weights(Protocol):
    """Where the weights of a model on the meta device are to come from."""

    def rows(self, name: str, start: int, stop: int) -> F32:
        """Rows of a parameter, f32."""


class CheckpointWeights:
    """Those of a checkpoint of any format, read when they are needed."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def rows(self, name: str, start: int, stop: int) -> F32:
        return self.checkpoint.source.rows(checkpoint_key(name), start, stop)


def open_start(folder: str | Path | Checkpoint, config: Pi05Config) -> tuple[Pi05, CheckpointWeights]:
    """A model of the run's geometry without weights, and the checkpoint's, for `Engine(model, settings, weights=...)`.

    The horizon is the run's. ArgumentError names what else differs; CheckpointError for a π0, or what cannot be read.
    """
    checkpoint = (
        folder if isinstance(folder, Checkpoint) else Checkpoint.open(folder, default_horizon=config.action_horizon)
    )
    given = checkpoint.config
    if given.variant != "pi05":
        raise CheckpointError(f"{checkpoint.path} holds a {given.variant}: only π0.5 is trained here")
    given = replace(given, **{name: getattr(config, name) for name in OF_DATA})
    differ = [
        f"{field.name} {getattr(given, field.name)}, not {getattr(config, field.name)}"
        for field in fields(config)
        if getattr(given, field.name) != getattr(config, field.name)
    ]
    if differ:
        raise ArgumentError(f"{checkpoint.path} cannot be the start of this run: its model has {'; '.join(differ)}")
    with torch.device("meta"):
        model = Pi05(config)
    return model, CheckpointWeights(checkpoint)


@torch.no_grad()
def fill(model: Pi05, weights: Weights, processes: Processes) -> None:
    """Give a model that has memory but no values its weights; of a sharded one each process reads its own rows.

    Adapters are left as they are.
    """
    for name, parameter in model.named_parameters():
        if module_of(name) is not None:
            continue
        target, start = local(parameter), first_row(parameter, processes)
        each = max(1, PIECE // max(1, parameter[:1].numel()))
        for at in range(0, len(target), each):
            stop = min(at + each, len(target))
            target[at:stop].copy_(torch.from_numpy(weights.rows(plain_name(name), start + at, start + stop)))
