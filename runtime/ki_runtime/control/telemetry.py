"""What a run measured: latencies, episodes, control rate, seams, guards; as text for people, JSON for machines."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
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
        self._values: dict[str, array[float]] = {}  # 8 bytes each: some of every tick, for hours

    def add(self, timing: Mapping[str, float]) -> None:
        """One measurement of some stages."""
        for stage, milliseconds in timing.items():
            self._values.setdefault(stage, array("d")).append(float(milliseconds))

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
    seconds: float  # from the first observation to the last action, of the loop's clock
    success: bool | None
    success_any: bool | None
    reached: int | None = None  # ticks until it was first successful
    replay_error: float | None = None  # of a replay: mean |predicted - recorded| over all actions, robot units


@dataclass(frozen=True)
class RunReport:
    """What `ControlLoop.run` did. The fields that are mappings are described in docs/run.md."""

    episodes: tuple[Episode, ...]
    latency: Mapping[str, Latency]  # by stage, milliseconds
    mode: str  # that was really active
    rate: Mapping[str, Any]
    seams: Mapping[str, Any]
    delay: Mapping[str, Any]
    guards: Mapping[str, Any]
    self_check: Mapping[str, Any] | None = None
    dropped: int = 0  # events that a slow watcher was not told
    backend: str | None = None
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
            "mode": self.mode,
            "backend": self.backend,
            "success_rate": self.success_rate,
            "success_rate_any": self.success_rate_any,
            "episodes": [asdict(episode) for episode in self.episodes],
            "latency_ms": {stage: asdict(latency) for stage, latency in self.latency.items()},
            "rate": dict(self.rate),
            "seams": dict(self.seams),
            "delay": dict(self.delay),
            "guards": dict(self.guards),
            "self_check": None if self.self_check is None else dict(self.self_check),
            "dropped_events": self.dropped,
            "interrupted": self.interrupted,
            "torch_loaded": "torch" in sys.modules,
        }

    def lines(self) -> list[str]:
        """The report for a terminal."""
        out = [f"episodes      {len(self.episodes)}{' (interrupted)' if self.interrupted else ''}, mode {self.mode}"]
        for name, rate in (("at the end", self.success_rate), ("at any step", self.success_rate_any)):
            if rate is not None:
                out.append(f"success       {100 * rate:.1f} % {name}")
        errors = [episode.replay_error for episode in self.episodes if episode.replay_error is not None]
        if errors:
            out.append(f"replay error  {sum(errors) / len(errors):.4g} mean |predicted - recorded|, robot units")
        out += self._rate_lines()
        inside = self.seams["inside"]["position"]
        for name, jump in (("seams", self.seams["position"]), ("in chunks", inside)):
            if jump is not None and self.seams["count"]:
                count = f", {self.seams['count']} of them" if name == "seams" else ""
                out.append(f"{name:<14}position step p50 {jump['p50']:.3g}, p95 {jump['p95']:.3g}{count}, robot units")
        found = [f"{kind} {count}" for kind, count in self.guards.items() if kind != "tripped" and count]
        if found:
            out.append(f"guards        {', '.join(found)}{'; tripped' if self.guards.get('tripped') else ''}")
        if self.self_check is not None:
            out.append(self._check_line(self.self_check))
        if self.dropped:
            out.append(f"recording     {self.dropped} events dropped: it could not keep up")
        if self.latency:
            out.append(f"{'milliseconds':<14}{'p50':>9}{'p99':>9}{'max':>9}{'count':>8}")
        for stage, x in self.latency.items():
            name = stage.removesuffix("_ms")
            out.append(f"  {name:<12}{x.p50:9.2f}{x.p99:9.2f}{x.max:9.2f}{x.count:8d}")
        return out

    def _check_line(self, check: Mapping[str, Any]) -> str:
        found, limit = check["disagreement"], check["limit"]
        apart = "" if found is None else f", disagreement p50 {found['p50']:.3f}, p95 {found['p95']:.3f}"
        beyond = "" if limit is None else f", {check['beyond']} beyond {limit:.3g}, {check['held']} ticks held"
        share = "" if check["share_of_time"] is None else f", {100 * check['share_of_time']:.1f} % of the time"
        return f"self-check    {check['count']} done, {check['given_up']} given up{apart}{beyond}{share}"

    def _rate_lines(self) -> list[str]:
        rate, real = self.rate, self.delay["real"]
        asked = "" if rate["asked_hz"] is None else f" of {rate['asked_hz']:g} asked"
        jitter = rate["jitter_ms"]
        late = "" if jitter is None else f", late by {jitter['p99']:.2f} ms (p99)"
        out = [f"control rate  {rate['achieved_hz']:.1f} Hz{asked}{late}"]
        if rate["missed"] or rate["starved"]:
            out.append(f"ticks         {rate['ticks']}, {rate['missed']} missed, {rate['starved']} without an action")
        if real is not None and real["p95"] > 0:
            out.append(f"delay         {real['p50']:g} actions an inference (p95 {real['p95']:g})")
        return out


def percentiles(values: Sequence[float], *percents: int) -> dict[str, float] | None:
    """{"p50": ..., "max": ...} of `percents`, 100 is the largest; None without values."""
    if not len(values):
        return None
    found = np.percentile(np.asarray(values, np.float64), percents)
    names = ["max" if percent == 100 else f"p{percent}" for percent in percents]
    return dict(zip(names, map(float, found), strict=True))


def _share(outcomes: list[bool | None]) -> float | None:
    known = [outcome for outcome in outcomes if outcome is not None]
    return sum(known) / len(known) if known else None
