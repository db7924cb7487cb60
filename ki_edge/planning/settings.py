"""What a training run can be told; without PyTorch, so that a command line knows it too."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ki_edge.errors import ArgumentError

GROUPS = ("vision", "projector", "backbone", "expert", "embeddings")  # of parameters
BACKBONE_SIDE = ("vision", "projector", "backbone", "embeddings")  # what the flow loss never reaches, if insulated
OPTIMIZERS = ("adamw", "adamw8bit")
MAX_RANK = 1024  # of an adapter
MOST = (1 << 31) - 1  # of anything that is counted
COUNTS = ("steps", "batch", "accumulate", "flow_draws", "save_every", "log_every")  # at least 1 each
OR_NONE = ("seed", "warmup", "decay_steps", "rtc_max_delay", "eval_every")  # 0 or more


@dataclass(frozen=True)
class TrainSettings:
    """What `ki-train` can be told. Times are drawn from Beta(1.5, 1) * 0.999 + 0.001, as openpi does."""

    # the steps
    steps: int = 20_000
    batch: int = 32  # samples of a step, over all processes and accumulated batches
    accumulate: int = 1  # batches of a process one after the other before a step
    seed: int = 0
    # the loss
    flow_weight: float = 1.0
    fast_weight: float = 1.0
    text_weight: float = 1.0
    flow_draws: int = 4  # noise and time draws for each sample: the prefix is shared, so they are cheap
    knowledge_insulation: bool = True  # stop-gradient on the backbone's K/V in every layer
    fast_loss: bool = True  # the backbone learns FAST tokens too
    rtc_max_delay: int = 0  # the most first actions that are given; how many is drawn, uniformly from 0 on
    rtc_offset: float = 0.0  # standard deviation of how far they lie beside the demonstration's, normalised
    # the optimiser
    learning_rate: float = 1e-3
    warmup: int = 300
    decay_steps: int = 0  # after which the cosine is at its end; 0: `steps`
    final_rate: float = 0.02  # of the learning rate, at the end of the cosine
    optimizer: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.998  # 0: the checkpoint holds the weights themselves
    freeze: tuple[str, ...] = ()  # groups of parameters that stay as they are
    expert_only: bool = False  # the backbone's side stays as it is, and there are no token losses
    rates: tuple[tuple[str, float], ...] = ()  # (group, factor of its learning rate)
    lora: tuple[tuple[str, int], ...] = ()  # (group, rank): adapters instead of the group's own matrices
    # the machine
    bfloat16: bool = True  # matrix products in bfloat16; weights, norms, softmax and optimiser stay float32
    checkpointing: bool = False  # layers are computed again in the backward pass
    # data
    augment: bool = False
    held_out: float = 0.0  # share of the episodes that are evaluated on instead
    max_long: float = 0.01  # share of samples whose tokens may be too long
    # saving and looking
    save_every: int = 500
    log_every: int = 20
    eval_every: int = 0
    keep: str = "last:3,best:1"

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.decay_steps and self.decay_steps <= self.warmup:
            raise ArgumentError(
                f"decay_steps {self.decay_steps}: expected more than warmup ({self.warmup}), or 0: steps"
            )
        if not 0.0 <= self.rtc_offset < math.inf or (self.rtc_offset and not self.rtc_max_delay):
            raise ArgumentError(f"rtc_offset {self.rtc_offset}: expected 0 or more, above 0 only with rtc_max_delay")
        if not (0 < self.learning_rate < math.inf and self.clip > 0):
            raise ArgumentError("learning_rate and clip must be positive, and the first one finite")
        self._check_optimizer()
        if not 0.0 <= self.ema < 1.0 or not 0.0 <= self.max_long <= 1.0:
            raise ArgumentError(f"ema {self.ema}: expected 0 <= value < 1; max_long {self.max_long}: 0 to 1")

    def _check_numbers(self) -> None:
        """Each by itself."""
        for least, names in ((1, COUNTS), (0, OR_NONE)):
            for name in names:
                if not least <= getattr(self, name) <= MOST:
                    raise ArgumentError(
                        f"{name} {getattr(self, name)!s:.40}: expected at least {least}, at most {MOST}"
                    )
        for name in ("flow_weight", "fast_weight", "text_weight", "final_rate"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ArgumentError(f"{name} {getattr(self, name)}: expected 0 or more")

    def _check_optimizer(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ArgumentError(f"optimizer {self.optimizer}: expected one of {', '.join(OPTIMIZERS)}")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ArgumentError(f"{name} {getattr(self, name)}: expected 0 <= value < 1")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ArgumentError(f"weight_decay {self.weight_decay}: expected 0 or more")
        for flag, pairs in (("freeze", [(n, 0) for n in self.freeze]), ("rate", self.rates), ("lora", self.lora)):
            for name, _ in pairs:
                if name not in GROUPS:
                    raise ArgumentError(f"{flag} {name}: no such group of parameters, there are {', '.join(GROUPS)}")
            if len(dict(pairs)) < len(pairs):
                names = [name for name, _ in pairs]
                twice = next(name for name in names if names.count(name) > 1)
                raise ArgumentError(f"{flag} {twice}: it is given twice, say it once")
        for name, factor in self.rates:
            if not 0.0 < factor < math.inf:
                raise ArgumentError(f"rate {name}={factor}: expected a factor above 0; --freeze {name} lets it stay")
        for name, rank in self.lora:
            if not 1 <= rank <= MAX_RANK:
                raise ArgumentError(f"lora {name}={rank}: expected a rank of 1 to {MAX_RANK}")
        frozen = {*self.freeze, *(BACKBONE_SIDE if self.expert_only else ())}
        if both := sorted(frozen & {*dict(self.lora), *dict(self.rates)}):
            raise ArgumentError(f"{both[0]}: it stays as it is, so it can have neither an adapter nor a rate")

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warmup, then a cosine down to `final_rate`."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        length = (self.decay_steps or self.steps) - self.warmup
        done = min(1.0, max(0, step - self.warmup) / max(1, length))
        return (
            self.learning_rate * warm * (self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * done)))
        )
