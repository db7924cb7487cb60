"""What a run measured: latencies by stage, episodes, control rate; as text for people and JSON for machines."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

STAGES = ("observe_ms", "preprocess_ms", "prefix_ms", "denoise_ms", "postprocess_ms", "total_ms", "act_ms")


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one stage."""

    count: int
    mean: float
    p50: float
    p99: float
    max: float


class LatencyLog:
    """Milliseconds by stage, all of them, so that percentiles are exact."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, timing: Mapping[str, float]) -> None:
        """One measurement of some stages."""
        for stage, milliseconds in timing.items():
            self._values.setdefault(stage, []).append(float(milliseconds))

    def summary(self) -> dict[str, Latency]:
        """Stage -> its latency; the known stages first, in the order in which they happen."""
        order = [*(stage for stage in STAGES if stage in self._values), *(s for s in self._values if s not in STAGES)]
        return {stage: _latency(self._values[stage]) for stage in order}


def _latency(values: Iterable[float]) -> Latency:
    x = np.fromiter(values, np.float64)
    p50, p99 = np.percentile(x, [50, 99])
    return Latency(x.size, float(x.mean()), float(p50), float(p99), float(x.max()))


@dataclass(frozen=True)
class Episode:
    """One episode. `success` at its final step, `success_any` at any step; None where the robot cannot tell."""

    seed: int
    steps: int
    inferences: int
    seconds: float  # from the first observation to the last action
    success: bool | None
    success_any: bool | None
    replay_error: float | None = None  # of a replay: mean |predicted - recorded| over all actions, robot units


@dataclass(frozen=True)
class RunReport:
    """What `ControlLoop.run` did."""

    episodes: tuple[Episode, ...]
    latency: Mapping[str, Latency]  # by stage, milliseconds
    control_hz: float  # actions a second achieved, inference included
    interrupted: bool = False

    @property
    def success_rate(self) -> float | None:
        """Share of the episodes that ended in success; None if the robot cannot tell."""
        return _share([episode.success for episode in self.episodes])

    @property
    def success_rate_any(self) -> float | None:
        """Share of the episodes that were successful at some step."""
        return _share([episode.success_any for episode in self.episodes])

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the facts about this process that a report needs."""
        return {
            "episodes": [asdict(episode) for episode in self.episodes],
            "success_rate": self.success_rate,
            "success_rate_any": self.success_rate_any,
            "latency_ms": {stage: asdict(latency) for stage, latency in self.latency.items()},
            "control_hz": self.control_hz,
            "interrupted": self.interrupted,
            "torch_loaded": "torch" in sys.modules,
        }

    def lines(self) -> list[str]:
        """The report for a terminal."""
        out = [f"episodes      {len(self.episodes)}{' (interrupted)' if self.interrupted else ''}"]
        for name, rate in (("at the end", self.success_rate), ("at any step", self.success_rate_any)):
            if rate is not None:
                out.append(f"success       {100 * rate:.1f} % {name}")
        errors = [episode.replay_error for episode in self.episodes if episode.replay_error is not None]
        if errors:
            out.append(f"replay error  {sum(errors) / len(errors):.4g} mean |predicted - recorded|, robot units")
        out.append(f"control rate  {self.control_hz:.1f} Hz")
        if self.latency:
            out.append(f"{'milliseconds':<14}{'p50':>9}{'p99':>9}{'max':>9}{'count':>8}")
        for stage, x in self.latency.items():
            name = stage.removesuffix("_ms")
            out.append(f"  {name:<12}{x.p50:9.2f}{x.p99:9.2f}{x.max:9.2f}{x.count:8d}")
        return out


def _share(outcomes: list[bool | None]) -> float | None:
    known = [outcome for outcome in outcomes if outcome is not None]
    return sum(known) / len(known) if known else None
