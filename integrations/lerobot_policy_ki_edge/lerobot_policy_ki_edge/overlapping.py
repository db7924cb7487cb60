"""LeRobot's arguments of real-time chunking, as those of `ki_runtime.Policy.infer`."""

from __future__ import annotations

from typing import Any

import numpy as np
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from torch import Tensor

from ki_edge.errors import ArgumentError
from ki_edge.policy.chunking import Guiding, PreviousChunk, Way

from .opening import Runtime


def joining(
    runtime: Runtime, left: Tensor | None, delay: int | None, horizon: int | None, config: RTCConfig | None
) -> dict[str, Any]:
    """`previous`, `way` and `guiding` for `infer`; nothing where no actions are left of the chunk before.

    `left` [n, a] or [1, n, a], robot units: what is left of it, which LeRobot fills with zeros up to its execution
    horizon. Zeros are commands here, so they are taken away, and the policy holds the last action instead. `delay`:
    how many of them will be executed meanwhile; `horizon`: from where on they no longer pull. ArgumentError for a
    batch of several, or numbers out of range.
    """
    if left is None:
        return {}
    if runtime.rtc is None:
        raise ArgumentError(
            "prev_chunk_left_over: this policy cannot continue a chunk: export its checkpoint with --rtc"
        )
    rows = left.detach().cpu().numpy().astype(np.float64)
    if rows.ndim == 3 and len(rows) == 1:
        rows = rows[0]
    if rows.ndim != 2:
        raise ArgumentError(f"prev_chunk_left_over: expected [n, a] of one robot, got {list(rows.shape)}")
    rows = rows[: runtime.contract.action_horizon]
    used = np.flatnonzero((rows != 0).any(axis=1))
    if not used.size:
        return {}
    rows = rows[: used[-1] + 1]
    executed = min(delay or 0, len(rows))
    return {
        "previous": PreviousChunk(rows, _committed(executed, len(rows), horizon, config)),
        "way": _way(runtime, executed),
        "guiding": _guiding(executed, len(rows), horizon, config),
    }


def _way(runtime: Runtime, delay: int) -> Way | None:
    """The policy's own, or guided beyond the delays that it was trained for."""
    return "guided" if runtime.max_delay is not None and delay > runtime.max_delay else runtime.rtc


def _end(rows: int, horizon: int | None, config: RTCConfig | None) -> int:
    asked = horizon if horizon is not None else (rows if config is None else config.execution_horizon)
    return min(asked, rows)


def _schedule(config: RTCConfig | None) -> str:
    return "LINEAR" if config is None else str(config.prefix_attention_schedule.value)


def _committed(delay: int, rows: int, horizon: int | None, config: RTCConfig | None) -> int:
    """How many rows weigh fully. LeRobot's schedule ONES weighs all of them so."""
    return max(delay, _end(rows, horizon, config)) if _schedule(config) == "ONES" else delay


def _guiding(delay: int, rows: int, horizon: int | None, config: RTCConfig | None) -> Guiding:
    """LeRobot's schedule ZEROS lets no row pull that is not executed meanwhile."""
    schedule = _schedule(config)
    end = delay if schedule == "ZEROS" else _end(rows, horizon, config)
    maximum = None if config is None else config.max_guidance_weight
    return Guiding(maximum, "exponential" if schedule == "EXP" else "linear", end)
