"""First actions of a chunk that are given in training, as a robot that does not wait for its policy needs it.

Training-time real-time chunking (arXiv 2512.05964) gives the demonstration's own first actions. In a task whose first
actions tell its end, a policy learns to go on with them instead of looking: at work it then follows its own errors. So
what is given can be shifted by a random offset, which fades out over the actions after: how a demonstration would lead
back from there.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ki_edge.overlap import prefix_weights

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
FADE = 2  # actions, besides as many as are given, over which an offset fades out


def draw_delays(rng: np.random.Generator, count: int, max_delay: int) -> I64:
    """How many first actions of each chunk are given, i64 [count]: uniformly from 0 to `max_delay`."""
    return rng.integers(0, max_delay, count, endpoint=True)


def shifted(rng: np.random.Generator, actions: F32, delay: I64, spread: float, dims: int) -> F32:
    """`actions` [B,H,A] as chunks that begin elsewhere, one for each delay of R*B, draw by draw: f32 [R*B,H,A].

    The first `delay` actions of each lie beside the demonstration's by one offset, normally distributed with standard
    deviation `spread` (in normalised actions, over their first `dims` numbers); the next `delay + FADE` lead back.
    """
    horizon = actions.shape[1]
    offsets = np.zeros((len(delay), 1, actions.shape[2]), np.float32)
    offsets[..., :dims] = spread * rng.standard_normal((len(delay), 1, dims), np.float32)
    fades = np.zeros((len(delay), horizon, 1), np.float32)
    for row, given in enumerate(delay):
        if given:
            fades[row, :, 0] = prefix_weights(given, min(horizon, 2 * given + FADE), horizon, "linear")
    repeated = np.tile(actions, (len(delay) // len(actions), 1, 1))
    return np.asarray(repeated + fades * offsets, np.float32)
