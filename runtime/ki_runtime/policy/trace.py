"""What a sampler tells of a call besides its result: the time of its stages, and all that parity compares."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StageTimes:
    """Nanoseconds that a call spent in each stage; 0 for a stage that it did not use.

    A GPU's stages are queued without waiting in between: there only their sum is the time that they took.
    """

    prefix: int = 0
    denoise: int = 0
    fast: int = 0


@dataclass(frozen=True, eq=False)
class Trace:
    """Everything that parity compares, of one batch, in float32 on the host.

    S counts only the tokens that some row uses; `columns` i64 [S] tells their place among the N*P + T of the untrimmed
    prefix.
    """

    prefix_k: F32  # [L, B, K, S, D]
    prefix_v: F32  # [L, B, K, S, D]
    prefix_mask: npt.NDArray[np.bool_]  # [B, S]
    columns: Int64  # [S]
    x: F32  # [steps + 1, B, H, A]: noise, x after every step
