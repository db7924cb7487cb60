"""One optimiser step over all processes and accumulated batches, as if it were one process and one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ki_edge.errors import ArgumentError, DivergedError
from ki_edge.model import Pi05
from ki_edge.train.step.batch import ACTIONS, TERMS, Batch
from ki_edge.train.step.objective import Objective, Terms
from ki_edge.train.step.settings import TrainSettings
from ki_edge.train.step.training_data import Share

from .averaging import MovingAverage
from .groups import freeze, freeze_unused, optimizer_groups
from .processes import Processes
from .sharding import whole

COLUMNS = ("flow", "tokens", "kind", "source", "task", "row")  # of what is gathered of every sample


@dataclass(frozen=True)
class StepResult:
    """Of one step, the same on every process.

    `terms`: flow, fast, text that the step had samples of, each its mean over the whole step; `total`, what was
    minimised. `flow`, `tokens` f64 [n]: each sample's own means, NaN where it has none; `kind`, `source`, `task`, `row`
    i64 [n]; all on the CPU, samples process by process, batch by batch. `grad_norm`: before clipping.
    """

    terms: dict[str, float]
    grad_norm: float
    flow: Tensor
    tokens: Tensor
    kind: Tensor
    source: Tensor
    task: Tensor
    row: Tensor


class Engine:
    """A model in training on all devices of a run. Every process calls the same methods in the same order."""

    def __init__(self, model: Pi05, settings: TrainSettings, *, strategy: str = "auto") -> None:
        self.settings, self.step = settings, 0
        self.processes = Processes()
        self.rank, self.world, self.main = self.processes.rank, self.processes.world, self.processes.main
        self.device = self.processes.device
        _check_batch(settings, self.world)
        model.knowledge_insulation = settings.knowledge_insulation
        self.model = model.train().to(self.device)
        objective = Objective(self.model, loss_weights(settings)).to(self.device)
        freeze(self.model, settings.freeze)
        freeze_unused(self.model, tokens=objective.tokens)
        self.objective: nn.Module = objective
        self.tokens = objective.tokens
        self.learning = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        groups = optimizer_groups(self.learning, dict(settings.rates), settings.weight_decay)
        self.optimizer = torch.optim.AdamW(
            groups, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), fused=self.device.type == "cuda"
        )
        self.average = MovingAverage(self.learning, settings.ema)

    def share(self) -> Share:
        """The rows of a step's batch that this process computes."""
        return Share(self.rank, self.world, self.settings.accumulate)

    # ------------------------------------------------------------------ steps

    def train_step(self, batches: Sequence[Batch], rate: float) -> StepResult:
        """One step over this process' batches.

        DivergedError, with nothing changed, if loss or gradient is not finite.
        """
        counts = torch.stack([batch.counts() for batch in batches]).sum(dim=0).to(self.device)
        self.processes.sum(counts)
        self.optimizer.zero_grad(set_to_none=True)
        moved = [batch.to(self.device) for batch in batches]
        terms = [self._backward(batch, counts, last=at + 1 == len(moved)) for at, batch in enumerate(moved)]
        norm = self._clip()
        result = self._result(moved, terms, counts, norm)
        if not _is_finite(result):
            self.optimizer.zero_grad(set_to_none=True)
            raise _diverged(self.step, result, tokens=self.tokens)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimizer.step()
        self.average.update(self.step)
        self.step += 1
        return result

    def autocast(self) -> AbstractContextManager[object]:
        """Matrix products in the type of the settings, for a block that computes with the model."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bfloat16)

    def _backward(self, batch: Batch, counts: Tensor, *, last: bool) -> Terms:
        with self._reducing(last):
            with self.autocast():
                terms = cast(Terms, self.objective(batch, counts))
            # gradients become means over processes, and the shares of a step are to be summed
            (terms.total * self.world).backward()  # type: ignore[no-untyped-call]
        return Terms(*(part.detach() for part in terms))

    def _reducing(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext()

    def _clip(self) -> Tensor:
        """The gradient's norm over all shards, which is at most `clip` afterwards."""
        parameters = list(self.learning.values())
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.clip, norm)
        return norm

    def _result(self, batches: list[Batch], terms: list[Terms], counts: Tensor, norm: Tensor) -> StepResult:
        shares = self.processes.sum(torch.stack([part.shares for part in terms]).sum(dim=0).double())
        total = self.processes.sum(torch.stack([part.total for part in terms]).sum().double())
        columns = [
            torch.stack([part.flow, part.tokens, batch.kind, batch.source, batch.task, batch.row], dim=1).double()
            for batch, part in zip(batches, terms, strict=True)
        ]
        rows = self.processes.gather(torch.cat(columns)).cpu()
        values = {
            name: share for name, share, count in zip(TERMS, shares.tolist(), counts.tolist(), strict=True) if count
        }
        found = dict(zip(COLUMNS, rows.unbind(dim=1), strict=True))
        numbers = {name: found[name] if name in ("flow", "tokens") else found[name].long() for name in COLUMNS}
        return StepResult({**values, "total": total.item()}, norm.item(), **numbers)

    # ------------------------------------------------------------------ weights

    @contextmanager
    def averaged(self) -> Iterator[Pi05]:
        """The model with its moving average, in eval mode and without gradients; afterwards as it was, bit for bit."""
        self.average.swap()
        self.model.eval()
        try:
            with torch.no_grad(), self.autocast():
                yield self.model
        finally:
            self.model.train()
            self.average.swap()

    def averaged_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The moving average by parameter name, whole, f32 on the CPU, one after the other. All processes must ask."""
        for name, parameter in self.model.named_parameters():
            yield name, whole(self.average.values.get(name, parameter)).float().cpu()

    def averaged_state(self) -> dict[str, Tensor]:
        """`averaged_tensors` at once on the main process, nothing on the others."""
        found = {}
        for name, value in self.averaged_tensors():
            if self.main:
                found[name] = value
        return found

    def close(self) -> None:
        """Leave the group of processes."""
        self.processes.close()


def loss_weights(settings: TrainSettings) -> tuple[float, float, float]:
    """Weights in the order of TERMS."""
    tokens = (settings.fast_weight, settings.text_weight) if settings.fast_loss else (0.0, 0.0)
    return settings.flow_weight, *tokens


def _check_batch(settings: TrainSettings, world: int) -> None:
    parts = world * settings.accumulate
    if settings.batch % parts:
        raise ArgumentError(
            f"batch {settings.batch}: cannot be split over {world} processes with {settings.accumulate} batches each; "
            f"choose a multiple of {parts}"
        )


def _is_finite(result: StepResult) -> bool:
    values = torch.tensor([*result.terms.values(), result.grad_norm])
    return bool(torch.isfinite(values).all())


def _diverged(step: int, result: StepResult, *, tokens: bool) -> DivergedError:
    """Names the samples whose own loss is not finite, if that is the reason."""
    flow = (result.kind == ACTIONS) & ~torch.isfinite(result.flow)
    bad = flow | ~torch.isfinite(result.tokens) if tokens else flow
    samples = [(int(result.source[at]), int(result.row[at])) for at in bad.nonzero().flatten()]
    what = "the loss" if samples else "the gradient"
    return DivergedError(
        f"training diverged at step {step}: {what} is not finite; lower the learning rate, or look at the data",
        step,
        samples,
    )
