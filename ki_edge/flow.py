"""The flow-matching clock in numpy: denoising times, and everything that depends on time alone.

t = 1 is noise, t = 0 is data; dt = -1/steps; x_{t+dt} = x_t + dt * v_t (openpi pi0_pytorch.py, sample_actions).
What a step is told about its time (π0.5: all adaRMS modulations of the action expert; π0: the embedding of the time) is
computed once per number of steps and fed to the denoise graph one row a step; the sine of up to 1571 rad is taken in
float64 and never meets low precision.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .arguments import count
from .config import Pi05Config
from .errors import ArgumentError

F32 = npt.NDArray[np.float32]
MAX_STEPS = 1000
MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0
FAR = np.float32(-80)  # e^80 is 6e34, and 1 + e^80 the same number
TIME_CONVENTIONS = ("openpi", "lerobot")


def check_steps(num_steps: int) -> None:
    """ArgumentError unless 1 <= num_steps <= MAX_STEPS."""
    count(num_steps, "num_steps", MAX_STEPS)


def denoise_times(num_steps: int, convention: str = "openpi") -> F32:
    """Times of the velocity evaluations, f32 [steps], from 1 downwards.

    "openpi" accumulates t += dt in float32 (0.79999995 and so on); "lerobot" rounds 1 + step * dt to float32. The
    difference of 1e-7 moves actions by about 5e-5, so a bundle records which one its reference used.
    """
    check_steps(num_steps)
    if convention not in TIME_CONVENTIONS:
        raise ArgumentError(f"time convention {convention!r}: expected one of {', '.join(TIME_CONVENTIONS)}")
    if convention == "lerobot":
        return np.array([1.0 + step * (-1.0 / num_steps) for step in range(num_steps)], np.float32)
    dt, t, times = np.float32(-1.0 / num_steps), np.float32(1.0), []
    for _ in range(num_steps):
        times.append(t)
        t = t + dt
    return np.array(times, np.float32)


def step_size(num_steps: int) -> np.float32:
    """dt of the Euler step, negative."""
    check_steps(num_steps)
    return np.float32(-1.0 / num_steps)


def sincos_embedding(times: npt.ArrayLike, width: int) -> npt.NDArray[np.float64]:
    """[sin(2 pi t / period_k)..., cos(...)...], f64 [steps, width]; periods from 4e-3 to 4, geometric, both ends in."""
    t = np.asarray(times, np.float64)
    periods = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** np.linspace(0.0, 1.0, width // 2)
    angles = t[:, None] * (2.0 * np.pi / periods)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def modulation_names(depth: int) -> list[str]:
    """Prefixes of the M = 2 * depth + 1 modulation layers in order of use, as the checkpoint calls them."""
    expert = "paligemma_with_expert.gemma_expert.model."
    norms = ("input_layernorm", "post_attention_layernorm")
    return [f"{expert}layers.{i}.{norm}.dense" for i in range(depth) for norm in norms] + [f"{expert}norm.dense"]


def modulation_weights(config: Pi05Config) -> dict[str, tuple[int, ...]]:
    """All checkpoint tensors that `modulation_table` reads, and their shapes; none for a π0."""
    if config.variant == "pi0":
        return {}
    width = config.expert.width
    rows = {"time_mlp_in": width, "time_mlp_out": width}
    rows.update(dict.fromkeys(modulation_names(config.expert.depth), 3 * width))
    return {
        f"{layer}.{part}": (size, width) if part == "weight" else (size,)
        for layer, size in rows.items()
        for part in ("weight", "bias")
    }


def modulation_table(tensor: Callable[[str], npt.NDArray[np.floating]], times: F32, config: Pi05Config) -> F32:
    """The denoise graph's `modulation` at every time, f32 [steps, M, R]. `tensor(name)` returns a checkpoint tensor."""
    embedding = sincos_embedding(times, config.expert.width).astype(np.float32)
    if config.variant == "pi0":
        return embedding[:, None, :]
    return _adarms_rows(tensor, embedding, modulation_names(config.expert.depth))


def _adarms_rows(tensor: Callable[[str], npt.NDArray[np.floating]], embedding: F32, norms: list[str]) -> F32:
    """Scale, shift and gate of each norm, in that order, f32 [steps, M, 3W].

    cond = silu(time_mlp_out(silu(time_mlp_in(embedding)))), then one dense layer a norm (openpi gemma.py adaRMS;
    pi0_pytorch.py embed_suffix). Computed in float32 as the reference does it.
    """

    def dense(x: F32, layer: str) -> F32:
        weight, bias = tensor(f"{layer}.weight"), tensor(f"{layer}.bias")
        return np.asarray(x @ np.asarray(weight, np.float32).T + np.asarray(bias, np.float32), np.float32)

    cond = embedding
    for layer in ("time_mlp_in", "time_mlp_out"):
        cond = _silu(dense(cond, layer))
    return np.stack([dense(cond, norm) for norm in norms], axis=1)


def _silu(x: F32) -> F32:
    """x / (1 + e^-x); far below 0, where e^-x leaves float32, it is x e^x, rounded once."""
    far = np.minimum(x, FAR).astype(np.float64)
    return np.asarray(np.where(x < FAR, far * np.exp(far), x / (1.0 + np.exp(-np.maximum(x, FAR)))), np.float32)
