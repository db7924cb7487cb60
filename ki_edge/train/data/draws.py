"""What is drawn for a sample of a step, by the seed, the step and the sample's row alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ki_edge.planning.settings import TrainSettings
from ki_edge.train.step.delays import draw_delays, shifted

Float32 = npt.NDArray[np.float32]
DRAWS, HELD_DRAWS, AUGMENTATION = 31, 32, 33  # tell the random numbers of one purpose from another's


@dataclass(frozen=True)
class Draws:
    """noise f32 [R,H,A], time f32 [R] in (0, 1], delay i64 [R]; given f32 [R,H,A] where actions differ by draw."""

    noise: Float32
    time: Float32
    delay: npt.NDArray[np.int64] | None
    given: Float32 | None


def draw(settings: TrainSettings, key: tuple[int, ...], actions: Float32, dims: int) -> Draws:
    """For one sample: `actions` [H,A], of a robot with `dims` numbers. Times: Beta(1.5, 1) * 0.999 + 0.001."""
    rng = np.random.default_rng(key)
    count = settings.flow_draws
    noise = rng.standard_normal((count, *actions.shape), np.float32)
    time = (rng.beta(1.5, 1.0, count) * 0.999 + 0.001).astype(np.float32)
    if not settings.rtc_max_delay:
        return Draws(noise, time, None, None)
    delay = draw_delays(rng, count, settings.rtc_max_delay)
    given = shifted(rng, actions[None], delay, settings.rtc_offset, dims) if settings.rtc_offset else None
    return Draws(noise, time, delay, given)
