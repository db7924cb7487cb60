"""Checkpoints that were trained with the answer in view: FAST tokens in the prefix that the action expert reads.

At inference these tokens are not there, so such a policy moves as if blind to what it learnt from. No tensor tells; its
config may, and its behaviour does: its flow loss is much lower where the expert sees the tokens of the very actions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ki_edge.errors import CheckpointError, DatasetError
from ki_edge.files.reading import read_object
from ki_edge.model import Pi05
from ki_edge.model.loss import embed_fast_sequence
from ki_edge.train.step.batch import ACTIONS, Batch

LOWER = 0.8  # of the loss without the tokens: a checkpoint whose loss with them is below that was trained with them
SURE = 3.0  # standard errors that the difference of a frame must have
LEAST = 8  # frames that say anything
LEARNT = 0.8  # of the loss of predicting nothing: a policy that is not below that knows these data in neither way
ROUNDING = 1e-6  # of a loss: a smaller difference is none
# fields of config.json that the code had which trained so; LeRobot and OpenTau, who do it right, have others
OLD_FIELDS = ("ki_fast_token_loss_weight", "ki_fast_loss_weight")
RETRAIN = (
    "it was trained with FAST tokens in the prefix, which are not there when it acts: it needs to be trained again "
    "(ki-train --init on it keeps what its backbone knows)"
)


@dataclass(frozen=True)
class Probe:
    """Flow loss of `samples` different frames without and with their FAST tokens in view of the expert; `sure`:
    standard errors by which a frame's loss without them is higher; `nothing`: the loss of a velocity of 0."""

    without: float
    seeing: float
    samples: int
    sure: float
    nothing: float = math.inf

    @property
    def leaks(self) -> bool:
        """Whether it was trained with them in view."""
        return self.seeing < LOWER * self.without and self.sure > SURE

    @property
    def doubt(self) -> str | None:
        """Why it cannot be told; None if it can."""
        if self.leaks:
            return None
        if min(self.without, self.seeing) > LEARNT * self.nothing:
            return f"the policy has not learnt such data (predicting nothing has a loss of {self.nothing:.4g})"
        if self.seeing < LOWER * self.without:
            return f"the difference is {self.sure:.1f} standard errors, {SURE:g} are needed: look at more --samples"
        return None

    def line(self) -> str:
        """What was found, for people."""
        figures = (
            f"flow loss {self.without:.4g} as it acts, {self.seeing:.4g} with the FAST tokens in view, over "
            f"{self.samples} frames, {self.sure:.1f} standard errors apart"
        )
        if self.doubt is not None:
            return f"{figures}: cannot tell: {self.doubt}"
        return f"{figures}: {RETRAIN if self.leaks else 'it was not trained with them in view'}"

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        found = {"flow": self.without, "flow_with_tokens": self.seeing, "samples": self.samples}
        known = {"flow_of_nothing": self.nothing, "standard_errors": self.sure}
        finite = {name: value if math.isfinite(value) else None for name, value in known.items()}
        return {**found, **finite, "leaks": None if self.doubt else self.leaks, "doubt": self.doubt}


def told_by_config(folder: Path) -> str | None:
    """Why a checkpoint's config makes it suspicious; None if it does not, or has none."""
    try:
        config = read_object(folder / "config.json", CheckpointError)
    except CheckpointError:
        return None
    known = [name for name in OLD_FIELDS if name in config]
    if not known and str(config.get("model_type", "")).lower().rpartition(".")[2] != "pi05_ki":
        return None
    what = f"'{known[0]}'" if known else "model_type 'pi05_ki'"
    return f"{folder}: its config has {what}, as code had that trained with FAST tokens in the prefix: probe it"


def probe(model: Pi05, batches: Iterable[Batch]) -> Probe:
    """Of samples that it was not trained on, on the model's device. DatasetError for fewer than 8 with FAST tokens.

    A frame that comes again, with other noise, makes its own loss more exact and counts once.
    """
    frames: dict[tuple[int, int], list[tuple[float, float, float]]] = {}
    model.eval()
    for batch in batches:
        moved = batch.to(next(model.parameters()).device)
        mask = moved.observation.fast_mask
        if mask is None:
            continue
        rows = (moved.kind == ACTIONS) & mask.any(dim=1) & moved.real.any(dim=1)
        with torch.no_grad():
            found = torch.stack([_flow(model, moved, tokens=tokens) for tokens in (False, True)] + [_nothing(moved)])
        for at in rows.nonzero().flatten().tolist():
            one, two, three = found[:, at].double().tolist()
            frames.setdefault((int(batch.source[at]), int(batch.row[at])), []).append((one, two, three))
    if len(frames) < LEAST:
        raise DatasetError(f"{len(frames)} samples with FAST tokens, at least {LEAST} are needed to say anything")
    each = torch.tensor([[sum(part) / len(seen) for part in zip(*seen, strict=True)] for seen in frames.values()],
                        dtype=torch.float64)  # fmt: skip
    without, seeing, nothing = each.mean(dim=0).tolist()
    return Probe(without, seeing, len(each), _standard_errors(each[:, 0] - each[:, 1], without), nothing)


def _standard_errors(apart: Tensor, loss: float) -> float:
    """By how many a mean difference is above 0; 0 for what rounding makes of none."""
    mean, error = float(apart.mean()), float(apart.std()) / math.sqrt(len(apart))
    if abs(mean) <= ROUNDING * abs(loss):
        return 0.0
    return mean / error if error > 0 else math.copysign(math.inf, mean)


def flow_with_tokens(model: Pi05, batch: Batch) -> Tensor:
    """(v_t - u_t)^2 [R*B,H,A] of an expert that sees the postfix too, as the seed of these checkpoints was trained."""
    x, mask, bias = embed_fast_sequence(model, batch.observation)
    assert batch.observation.fast_mask is not None
    seen = torch.cat([mask, batch.observation.fast_mask], dim=1)
    rope = model._rope(seen.long().cumsum(dim=1) - 1)
    cache = model.backbone.keys_values(x, rope, bias)
    draws = len(batch.noise) // len(batch)
    prefix = [(k.detach().repeat(draws, 1, 1, 1), v.detach().repeat(draws, 1, 1, 1)) for k, v in cache]
    actions, t = batch.actions.repeat(draws, 1, 1), batch.time[:, None, None]
    x_t = t * batch.noise + (1.0 - t) * actions
    v_t = model.velocity(x_t, model.modulation(batch.time), prefix, seen.repeat(draws, 1))
    return (v_t - (batch.noise - actions)).square()


def _flow(model: Pi05, batch: Batch, *, tokens: bool) -> Tensor:
    """Mean of each sample [B], over its draws, recorded actions and own numbers."""
    if tokens:
        squares = flow_with_tokens(model, batch)
    else:
        squares = model.compute_loss(batch.observation, batch.actions, noise=batch.noise, time=batch.time).flow
    return _mean(batch, squares)


def _nothing(batch: Batch) -> Tensor:
    """The same of a velocity of 0."""
    return _mean(batch, (batch.noise - batch.actions.repeat(len(batch.noise) // len(batch), 1, 1)).square())


def _mean(batch: Batch, squares: Tensor) -> Tensor:
    draws = len(batch.noise) // len(batch)
    counts = (batch.real[:, :, None] & batch.dims[:, None, :]).to(squares.dtype)  # [B,H,A]
    total = (squares.reshape(draws, *counts.shape) * counts).sum(dim=(0, 2, 3))
    return total / (draws * counts.sum(dim=(1, 2))).clamp(min=1.0)
