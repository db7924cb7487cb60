"""One optimiser step over all processes and accumulated batches, as if it were one process and one batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ki_edge.errors import ArgumentError
from ki_edge.model import Pi05
from ki_edge.model.checkpoint import write_checkpoint
from ki_edge.model.layers import Layer
from ki_edge.planning.settings import BACKBONE_SIDE, TrainSettings
from ki_edge.proc import peak_memory
from ki_edge.train.step.batch import Batch
from ki_edge.train.step.objective import Objective, Terms
from ki_edge.train.step.training_data import Share

from . import state
from .adapters import install, merged, module_of, plain_name, save_adapter, start
from .averaging import MovingAverage
from .groups import freeze, freeze_unused
from .optimizers import Optimizer
from .processes import Processes
from .results import StepResult, diverged, gathered, is_finite
from .sharding import choose, reducing, release, replicate, shard, whole
from .starting import Weights, fill


class Engine:
    """A model in training on all devices of a run. Every process calls the same methods in the same order.

    `base`: what an adapter's folder names as its base, if that is known.
    """

    base: str | None = None
    finish: Callable[[str, Tensor], Tensor] | None = None  # makes of a tensor of the average what is saved of it

    def __init__(
        self, model: Pi05, settings: TrainSettings, *, strategy: str = "auto", weights: Weights | None = None
    ) -> None:
        """`weights`: of a model on the meta device, read as they are needed (`starting.open_start`)."""
        self.settings, self.step = settings, 0
        self.processes = Processes()
        self.rank, self.world, self.main = self.processes.rank, self.processes.world, self.processes.main
        self.device = self.processes.device
        _check_batch(settings, self.world)
        self.model = _prepared(model, settings)
        objective = Objective(model, loss_weights(settings))
        self.tokens = objective.tokens
        freeze_unused(model, tokens=self.tokens)
        self.strategy = choose(strategy, model, self.processes)
        self._place(weights)
        self.objective: nn.Module = replicate(objective) if self.strategy == "ddp" else objective
        self.learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = Optimizer(self.learning, settings, self.processes)
        self.average = MovingAverage(self.learning, settings.ema)

    def _place(self, weights: Weights | None) -> None:
        """Spread the model over the devices, and read its weights if it has none yet."""
        model = self.model
        if self.strategy == "fsdp2":
            shard(model, self.processes, bfloat16=self.settings.bfloat16)
        if weights is not None:
            model.to_empty(device=self.device)
            fill(model, weights, self.processes)
        elif self.strategy != "fsdp2":  # shards are where they belong already
            model.to(self.device)
        start(model, self.processes, self.settings.seed)

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
        self.optimizer.clear()
        moved = [batch.to(self.device) for batch in batches]
        terms = [self._backward(batch, counts, last=at + 1 == len(moved)) for at, batch in enumerate(moved)]
        norm = self._clip()
        result = gathered(self.processes, moved, terms, counts, norm, tokens=self.tokens)
        if not is_finite(result):
            self.optimizer.clear()
            raise diverged(self.step, result, tokens=self.tokens)
        self.optimizer.step(rate)
        self.average.update(self.step)
        self.step += 1
        return result

    def autocast(self) -> AbstractContextManager[object]:
        """Matrix products in the type of the settings, for a block that computes with the model."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bfloat16)

    def _backward(self, batch: Batch, counts: Tensor, *, last: bool) -> Terms:
        with reducing(self.objective, last):
            with self.autocast():
                terms = cast(Terms, self.objective(batch, counts))
            # gradients become means over processes, and the shares of a step are to be summed
            (terms.total * self.world).backward()  # type: ignore[no-untyped-call]
        return Terms(*(part.detach() for part in terms))

    def _clip(self) -> Tensor:
        """The gradient's norm over all shards, which is at most `clip` afterwards."""
        parameters = list(self.learning.values())
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.clip, norm)
        return norm

    # ------------------------------------------------------------------ weights

    @contextmanager
    def averaged(self) -> Iterator[Pi05]:
        """The model with its moving average, in eval mode and without gradients; afterwards as it was, bit for bit.

        Where it is sharded, all processes must call the same methods (`sharding.METHODS`) of it as often.
        """
        self.average.swap()
        release(self.model)
        self.model.eval()
        try:
            with torch.no_grad(), self.autocast():
                yield self.model
        finally:
            self.model.train()
            self.average.swap()
            release(self.model)

    def averaged_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The moving average by the model's parameter names, adapters merged, f32 on the CPU, one after the other.

        All processes must ask for all of them; only what the main one gets is that.
        """
        parameters = dict(self.model.named_parameters())
        adapters: dict[str, dict[str, str]] = {}
        for name in parameters:
            if found := module_of(name):
                adapters.setdefault(found[0], {})[found[1]] = name
        for name in parameters:
            if module_of(name) is None:
                plain = plain_name(name)
                module, _, kind = plain.rpartition(".")
                parts = adapters.get(module, {}) if kind == "weight" else {}
                factors = {part: self._averaged(parameters, other) for part, other in parts.items()}
                value = self._averaged(parameters, name)
                if self.main:
                    value = merged(value, factors) if factors else value
                    value = value if self.finish is None else self.finish(plain, value)
                yield plain, value

    def _averaged(self, parameters: Mapping[str, Tensor], name: str) -> Tensor:
        value = whole(self.average.values.get(name, parameters[name]))
        return value.float().cpu() if self.main else value  # the others only help to gather it

    def save_checkpoint(self, folder: Path) -> None:
        """Write the moving average in openpi's layout, and with LoRA the PEFT folder `adapter` beside it.

        All processes must call it, and the main one writes.
        """
        with self.processes.together():
            self._written(lambda tensors: write_checkpoint(self.model.config, tensors, folder), self.averaged_tensors())
            if self.settings.lora:
                parameters = dict(self.model.named_parameters())
                shapes = {name: tuple(parameters[name].shape) for name in self.learning}
                tensors = ((name, self._averaged(parameters, name)) for name in self.learning)
                self._written(lambda each: save_adapter(folder / "adapter", each, shapes, self.base), tensors)

    def _written(
        self, write: Callable[[Iterator[tuple[str, Tensor]]], None], tensors: Iterator[tuple[str, Tensor]]
    ) -> None:
        """Let the main process write tensors that all of them gather; whatever it does, all are gathered."""
        try:
            if self.main:
                write(tensors)
        finally:
            deque(tensors, maxlen=0)

    # ------------------------------------------------------------------ state

    def save_state(self, folder: Path) -> None:
        """Write all that a run goes on with into a folder, which any number of processes can read."""
        with self.processes.together():
            state.save(folder, self._tensors(), self.step)

    def load_state(self, folder: Path) -> None:
        """Go on where a state was saved, bit for bit. CheckpointError if it is damaged or of another model."""
        with self.processes.together():
            self.step = state.load(folder, self._tensors())
        self.optimizer.count(self.step)
        release(self.model)

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that a run goes on with, but for the step; the tensors themselves."""
        found = {f"weights.{name}": value.detach() for name, value in self.model.named_parameters()}
        found |= {f"constants.{name}": value for name, value in self.model.named_buffers()}
        found |= {f"average.{name}": value for name, value in self.average.values.items()}
        return found | {f"optimizer.{name}": value for name, value in self.optimizer.tensors(self.step).items()}

    # ------------------------------------------------------------------ processes

    def any(self, value: bool) -> bool:
        """Whether a thing is so in one of the processes; the same answer in all."""
        if self.world == 1:
            return value
        return bool(self.processes.sum(torch.tensor([float(value)], device=self.device)).item())

    def peak_memory(self) -> int | None:
        """Bytes that this process has taken at most, of its device or the machine; None where nobody says."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return peak_memory()

    def wait_for_main(self, step: int) -> None:
        """Until the main process is here, however long what it does alone at this step takes."""
        self.processes.wait_for_main(f"step {step}")

    def close(self) -> None:
        """Leave the group of processes."""
        self.processes.close()


def _prepared(model: Pi05, settings: TrainSettings) -> Pi05:
    """Adapters in it, what stays as it is frozen, layers told whether they are to be computed again."""
    model.train()
    model.knowledge_insulation = settings.knowledge_insulation
    install(model, dict(settings.lora))
    freeze(model, (*settings.freeze, *(BACKBONE_SIDE if settings.expert_only else ())))
    for module in model.modules():
        if isinstance(module, Layer):
            module.recompute = settings.checkpointing
    return model


def loss_weights(settings: TrainSettings) -> tuple[float, float, float]:
    """Weights in the order of TERMS."""
    learns = settings.fast_loss and not settings.expert_only
    tokens = (settings.fast_weight, settings.text_weight) if learns else (0.0, 0.0)
    return settings.flow_weight, *tokens


def _check_batch(settings: TrainSettings, world: int) -> None:
    parts = world * settings.accumulate
    if settings.batch % parts:
        raise ArgumentError(
            f"batch {settings.batch}: cannot be split over {world} processes with {settings.accumulate} batches each; "
            f"choose a multiple of {parts}"
        )
