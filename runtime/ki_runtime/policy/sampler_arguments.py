"""What a call of the sampler may be given besides the observation, and what may come out of it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ki_edge.arguments import array_of, seed_of
from ki_edge.bundle import Bundle
from ki_edge.config import Pi05Config
from ki_edge.errors import ArgumentError, BackendError
from ki_edge.overlap import Overlap

F32 = npt.NDArray[np.float32]
WITHOUT_RTC = "was exported without real-time chunking: export its checkpoint with --rtc"


def noise_of(noise: npt.ArrayLike | None, seed: int | None, batch: int, config: Pi05Config) -> F32:
    """x at t = 1, f32 [B, H, A]: what is given, or drawn. ArgumentError for other than that, or for both."""
    shape = (batch, config.action_horizon, config.action_dim)
    if noise is None:
        return np.random.default_rng(seed_of(seed)).standard_normal(shape, np.float32)
    if seed is not None:
        raise ArgumentError("noise and seed were both given: the seed would have no effect, pass one of them")
    given = array_of(noise, "noise")
    if given.shape != shape or given.dtype != np.float32:
        raise ArgumentError(f"noise: expected float32 {list(shape)}, got {given.dtype} {list(given.shape)}")
    if not np.isfinite(given).all():
        raise ArgumentError("noise holds NaN or infinity")
    return given


def check_overlap(overlap: Overlap | None, batch: int, bundle: Bundle) -> None:
    """ArgumentError unless the bundle's chunks can continue these."""
    if overlap is None:
        return
    if not isinstance(overlap, Overlap):
        raise ArgumentError(f"overlap: expected an Overlap of ki_edge.overlap, got {type(overlap).__name__}")
    config = bundle.manifest.config
    if config.rtc == "none":
        raise ArgumentError(f"{bundle.path} {WITHOUT_RTC}")
    overlap.check(batch, config.action_horizon, config.action_dim)
    if overlap.committed.any() and config.rtc != "trained":
        raise ArgumentError(f"{bundle.path} is of a policy that was not trained to take committed actions")


def check_finite(actions: F32, precision: str) -> None:
    """BackendError for actions that are not: nothing of them reaches a robot."""
    bad = int((~np.isfinite(actions)).sum())
    if bad:
        raise BackendError(
            f"the denoise graph in {precision} gave {bad} of {actions.size} numbers that are NaN or infinite; "
            "nothing is sent to the robot. Check the bundle with ki-parity; "
            f"{precision if precision != 'float32' else 'the backend'} is unsafe for this checkpoint"
        )
