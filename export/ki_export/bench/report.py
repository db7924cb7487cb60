"""What was measured, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .options import Case
from .peaks import Peaks
from .process import Memory, Startup
from .rounds import Spread, WarmUp

PREFIX, STEP, INFERENCE = "prefix", "denoise step", "inference"
FAST_FIRST, FAST_TOKEN = "FAST first token", "FAST token"


@dataclass(frozen=True)
class Stage:
    """One stage in one case: its time, its work, and the least time that this machine could need for it.

    `flops` by the type they are computed in; `bytes` of weights, inputs and outputs; `limit_ms` is the larger of
    flops / peak and bytes / bandwidth (of an inference: the sum over its runs of graphs), and `limited_by` which.
    """

    name: str
    case: Case
    tokens: int  # of the prefix
    time: Spread
    flops: Mapping[str, int]
    bytes: int
    limit_ms: float
    limited_by: str

    @property
    def reached(self) -> float:
        """Share of the limit: limit_ms / p50. Above 1 where the weights stay in the processor's cache."""
        return self.limit_ms / self.time.p50

    @property
    def gflops(self) -> float:
        """GFLOP/s at the median."""
        return sum(self.flops.values()) / (1e6 * self.time.p50)


@dataclass(frozen=True)
class Pictures:
    """A policy's pictures resized to the model's, before the model runs."""

    cameras: int
    size: tuple[int, int]  # height, width
    time: Spread


@dataclass(frozen=True)
class Ratio:
    """Its time over the first bundle's: of the medians, and the extremes of single rounds."""

    p50: float
    least: float
    most: float


@dataclass(frozen=True)
class Other:
    """Another bundle, or a checkpoint in PyTorch as openpi runs it, in the main case."""

    name: str
    engine: str  # a backend, or "PyTorch"
    precision: str
    tokens: int  # of the prefix that it computes; PyTorch's is padded
    prefix: Spread
    denoise: Spread
    total: Spread
    ratio: Ratio
    max_abs_difference: float | None  # of the actions; None for a model of another geometry
    memory: Memory | None


@dataclass(frozen=True)
class Report:
    """Everything. The first stages are those of the main case."""

    machine: Mapping[str, str]
    bundle: str
    precision: str
    model: Mapping[str, int]
    backend: str
    threads: int
    rounds: int
    warm_up_policy: str
    warm_up: Mapping[str, WarmUp]
    startup: Startup
    memory: Memory | None
    peaks: Peaks
    stages: tuple[Stage, ...]
    pictures: Pictures | None  # None for a bundle of the model alone
    others: tuple[Other, ...]
    other_load: float | None
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The same as JSON objects, with the derived figures."""
        found = asdict(self)
        for stage, data in zip(self.stages, found["stages"], strict=True):
            data.update(reached=stage.reached, gflops=stage.gflops)
        return found

    @property
    def main(self) -> list[Stage]:
        """Stages of the main case."""
        case = self.stages[0].case
        return [stage for stage in self.stages if stage.case == case]
