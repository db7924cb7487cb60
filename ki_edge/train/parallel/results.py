"""What a step tells: its terms, its gradient, every sample's own losses, and which samples made it fail."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ki_edge.errors import DivergedError
from ki_edge.train.step.batch import ACTIONS, TERMS, Batch
from ki_edge.train.step.objective import Terms

from .processes import Processes

COLUMNS = ("flow", "tokens", "spelled", "kind", "source", "task", "row")  # of what is gathered of every sample


@dataclass(frozen=True)
class StepResult:
    """Of one step, the same on every process.

    `terms`: flow, fast, text that the step had samples of, each its mean over the whole step; `total`, what was
    minimised. `flow`, `tokens` f64 [n]: each sample's own means, NaN where it has none; `spelled` (whether it has a
    postfix), `kind`, `source`, `task`, `row` i64 [n]. All on the CPU, samples process by process, batch by batch.
    `grad_norm`: before clipping.
    """

    terms: dict[str, float]
    grad_norm: float
    flow: Tensor
    tokens: Tensor
    spelled: Tensor
    kind: Tensor
    source: Tensor
    task: Tensor
    row: Tensor


def gathered(
    processes: Processes, batches: list[Batch], terms: list[Terms], counts: Tensor, norm: Tensor, *, tokens: bool
) -> StepResult:
    """What a step tells, from all processes; each must ask. `tokens`: whether the run has token losses."""
    shares = processes.sum(torch.stack([part.shares for part in terms]).sum(dim=0).double())
    total = processes.sum(torch.stack([part.total for part in terms]).sum().double())
    columns = [
        torch.stack(
            [part.flow, part.tokens, batch.spelled, batch.kind, batch.source, batch.task, batch.row], dim=1
        ).double()
        for batch, part in zip(batches, terms, strict=True)
    ]
    rows = processes.gather(torch.cat(columns)).cpu()
    computed = TERMS if tokens else TERMS[:1]
    values = {name: share for name, share, n in zip(computed, shares.tolist(), counts.tolist(), strict=False) if n}
    found = dict(zip(COLUMNS, rows.unbind(dim=1), strict=True))
    numbers = {name: found[name] if name in ("flow", "tokens") else found[name].long() for name in COLUMNS}
    return StepResult({**values, "total": total.item()}, norm.item(), **numbers)


def is_finite(result: StepResult) -> bool:
    """Whether loss and gradient are."""
    values = torch.tensor([*result.terms.values(), result.grad_norm])
    return bool(torch.isfinite(values).all())


def diverged(step: int, result: StepResult, *, tokens: bool) -> DivergedError:
    """Names the samples whose own loss is not finite, if that is the reason."""
    flow = (result.kind == ACTIONS) & ~torch.isfinite(result.flow)
    bad = flow | ((result.spelled > 0) & ~torch.isfinite(result.tokens)) if tokens else flow
    samples = [(int(result.source[at]), int(result.row[at])) for at in bad.nonzero().flatten()]
    what = "the loss" if samples else "the gradient"
    return DivergedError(
        f"training diverged at step {step}: {what} is not finite; lower the learning rate, or look at the data",
        step,
        samples,
    )
