"""Scales of static quantisation, chosen by the error that they leave, not by belief.

For products of one operand x with weights W, what rounding does to x W^T is estimated channel by channel from rows
that were seen: E[dx_j^2] |W_j|^2 + E[x_j^2] |dW_j|^2, summed over channels j. Two things are tried: to let the largest
values saturate, and to balance: x_j / b_j and W_j * b_j, with powers of two b, between channels whose operands are
large and channels whose weights are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ki_export.weights.rounding import (
    Kind,
    round_blocks,
    round_values,
    round_weight,
    scale_of,
    second_scale,
    times_blocks,
)

CLIPS = (1.0, 0.85, 0.7, 0.55, 0.4, 0.3, 0.2, 0.12, 0.07)  # shares of the largest value that were seen
HEADROOM = {"int8": 1.15, "fp8": 1.5, "nvfp4": 1.5}  # over the largest that was seen, where nothing is to saturate
STRENGTHS = (0.5, 0.75)  # of balancing: 1 takes all outliers out of the operand, 0 out of the weight
WORTH = 0.85  # share of the error that balancing may leave: an operation more in the graph must pay
SAMPLED = 256  # rows of a weight that the error is estimated on
LIMIT = 6  # balances are within 2^-6 and 2^6


@dataclass(frozen=True, eq=False)
class Choice:
    """What was chosen for one operand. `scale` as `LowProduct.operand`; `balance` f32 [in] powers of two, or None.

    `error`: the estimated relative error of the products (L2); `plain`: without clipping and balancing.
    """

    scale: float
    balance: Tensor | None
    error: float
    plain: float


def choose(rows: Tensor, largest: Tensor, weights: Sequence[Tensor], kind: Kind) -> Choice:
    """The scale of an operand with `rows` f32 [n,in] and channels' `largest` [in]; `weights` [out,in] that it meets."""
    sampled = [_sample(weight) for weight in weights]
    norm = sum(float((rows @ weight.T).square().mean(0).sum()) for weight in sampled)
    if norm == 0:
        return Choice(_scale(largest.amax(), kind), None, 0.0, 0.0)
    (plain,) = _clips(rows, largest, sampled, kind, CLIPS[:1])
    best, scale = _best(rows, largest, sampled, kind)
    balance = None
    for strength in STRENGTHS:
        b = balancing(largest, weights, strength)
        if bool((b == 1).all()):
            continue
        error, found = _best(rows / b, largest / b, [weight * b for weight in sampled], kind)
        if error < best * (WORTH**2 if balance is None else 1.0):
            best, scale, balance = error, found, b
    return Choice(scale, balance, (best / norm) ** 0.5, (plain[0] / norm) ** 0.5)


def balancing(largest: Tensor, weights: Sequence[Tensor], strength: float) -> Tensor:
    """b f32 [in]: powers of two, 1 for channels that are never used; their middle is 1."""
    columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    used = (largest > 0) & (columns > 0)
    wish = strength * largest.clamp(min=1e-30).log2() - (1 - strength) * columns.clamp(min=1e-30).log2()
    middle = wish[used].median() if bool(used.any()) else torch.zeros(())
    exponents = torch.where(used, (wish - middle).round().clamp(-LIMIT, LIMIT), torch.zeros(()))
    return torch.exp2(exponents)


def choose_alone(rows: Tensor, largest: Tensor, kind: Kind) -> tuple[float, float]:
    """Scale and relative error of one side of an attention's product, by the error of the operand itself."""
    norm = float(rows.square().sum())
    if norm == 0:
        return _scale(largest.amax(), kind), 0.0
    tried = [(float(_error(rows, clip, kind).sum()), clip) for clip in _candidates(largest, CLIPS, kind)]
    error, clip = min(tried)
    return _scale(torch.tensor(clip), kind), (error / norm) ** 0.5


def round_operand(x: Tensor, scale: float, kind: Kind) -> Tensor:
    """An operand as the graph rounds it with a static scale, f32."""
    if kind == "nvfp4":
        values, scales = round_blocks(x, torch.tensor(scale))
        return times_blocks(values, scales) * scale
    return round_values(x / scale, kind) * scale


def _best(rows: Tensor, largest: Tensor, weights: Sequence[Tensor], kind: Kind) -> tuple[float, float]:
    """(error, scale) of the share of the largest value that leaves least; all of it unless that pays."""
    whole, *cut = _clips(rows, largest, weights, kind, CLIPS)
    best = min(cut)
    return best if best[0] < WORTH**2 * whole[0] else whole


def _clips(
    rows: Tensor, largest: Tensor, weights: Sequence[Tensor], kind: Kind, shares: Sequence[float]
) -> Iterator[tuple[float, float]]:
    """(error of the products, scale) of each share of the largest value."""
    sizes = torch.stack([weight.square().sum(0) for weight in weights]).sum(0)
    changed = torch.stack([_weight_error(weight, kind) for weight in weights]).sum(0)
    fixed = float((rows.square().mean(0) * changed).sum())
    for clip in _candidates(largest, shares, kind):
        yield float((_error(rows, clip, kind) * sizes).sum()) / len(rows) + fixed, _scale(torch.tensor(clip), kind)


def _candidates(largest: Tensor, shares: Sequence[float], kind: Kind) -> list[float]:
    top = float(largest.amax())
    return [top * (HEADROOM[kind] if share == 1.0 else share) for share in shares]


def _scale(clip: Tensor, kind: Kind) -> float:
    return float(second_scale(clip) if kind == "nvfp4" else scale_of(clip, kind))


def _error(rows: Tensor, clip: float, kind: Kind) -> Tensor:
    """[in]: squared error of each channel, summed over rows."""
    return (round_operand(rows, _scale(torch.tensor(clip), kind), kind) - rows).square().sum(0)


def _weight_error(weight: Tensor, kind: Kind) -> Tensor:
    low = round_weight(weight, kind)
    factor = low.factor[:, None] if low.factor.ndim else low.factor
    return (low.unscaled * factor - weight).square().sum(0)


def _sample(weight: Tensor) -> Tensor:
    return weight[:: max(1, len(weight) // SAMPLED)].float()
