"""The numbers of eight and four bits: how a value is rounded to one, and the scales of weights.

| kind | values | scale of a weight [out, in] |
|---|---|---|
| int8 | whole numbers from -127 to 127 | one an output: its largest magnitude at 127 |
| fp8 | e4m3: 4 significant bits up to 448, smallest step 2^-9 | one an output: its largest magnitude at 448 |
| nvfp4 | e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6, negatives | one in e4m3 for 16 inputs, times one in float32 for all |

Rounding is to the nearest, ties to even, and saturates: what ONNX and TensorRT define. Scales of int8 and fp8 are
numbers that float16 and bfloat16 both have, so that a graph may multiply by them in any type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["int8", "fp8", "nvfp4"]
KINDS: tuple[Kind, ...] = ("int8", "fp8", "nvfp4")
LARGEST = {"int8": 127.0, "fp8": 448.0, "nvfp4": 6.0}  # magnitude of a value
BLOCK = 16  # inputs that share a scale in nvfp4
SIGNIFICANT = 8  # bits of a scale: bfloat16 has no more
SMALLEST = 2.0**-24  # and float16 no smaller step


@dataclass(frozen=True, eq=False)
class LowWeight:
    """A weight [out, in] in a low kind: about values * scales * second, all as float32 tensors.

    `values` [out, in]; `scales` f32 [out], of nvfp4 [out, in / 16] (rounded to e4m3); `second` f32 [], 1 but for nvfp4.
    """

    kind: Kind
    values: Tensor
    scales: Tensor
    second: Tensor

    @property
    def unscaled(self) -> Tensor:
        """f32 [out, in] without what a product is multiplied by afterwards: exact in every kind."""
        if self.kind != "nvfp4":
            return self.values
        return times_blocks(self.values, self.scales)

    @property
    def factor(self) -> Tensor:
        """f32 [out] or []: what a product with `unscaled` is multiplied by."""
        return self.second if self.kind == "nvfp4" else self.scales


def round_values(x: Tensor, kind: Kind) -> Tensor:
    """`x` f32 rounded to the values of a kind, as f32. NaN stays NaN but for int8 (ONNX leaves it open)."""
    if kind == "int8":
        return x.round().clamp(-128.0, 127.0)
    return round_e4m3(x) if kind == "fp8" else round_e2m1(x)


def round_e4m3(x: Tensor) -> Tensor:
    """f32: the nearest e4m3 number, at most 448."""
    return x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).to(x.dtype)


def round_e2m1(x: Tensor) -> Tensor:
    """f32: the nearest e2m1 number, at most 6: steps of 0.5 below 2, of 1 below 4, of 2 above."""
    size = x.abs().clamp(max=6.0)
    step = torch.where(size < 2.0, 0.5, torch.where(size < 4.0, 1.0, 2.0))
    return torch.copysign((size / step).round() * step, x)


def scale_of(clip: Tensor, kind: Kind) -> Tensor:
    """f32 scales with which `clip` is at the largest value of int8 or fp8.

    Rounded up, so that nothing below `clip` saturates; of 0 the smallest.
    """
    exact = (clip.float() / LARGEST[kind]).clamp(min=SMALLEST)
    _, exponent = torch.frexp(exact)
    step = torch.exp2((exponent - SIGNIFICANT).float()).clamp(min=SMALLEST)
    return (exact / step).ceil() * step


def second_scale(clip: Tensor) -> Tensor:
    """f32: nvfp4's scale of a whole tensor: the block with magnitude `clip` has e4m3's largest scale."""
    return (clip.float() / (LARGEST["nvfp4"] * LARGEST["fp8"])).clamp(min=torch.finfo(torch.float32).tiny)


def times_blocks(values: Tensor, scales: Tensor) -> Tensor:
    """`values` [..., n] times the scales [..., n / 16] of their blocks."""
    blocks = values.reshape(*values.shape[:-1], -1, BLOCK) * scales[..., None]
    return blocks.reshape(values.shape)


def round_weight(weight: Tensor, kind: Kind) -> LowWeight:
    """A float32 weight [out, in] in a low kind. ValueError if nvfp4's blocks do not divide its width."""
    one = torch.ones(())
    if kind != "nvfp4":
        scales = scale_of(weight.abs().amax(1), kind)
        return LowWeight(kind, round_values(weight / scales[:, None], kind), scales, one)
    second = second_scale(weight.abs().max())
    values, scales = round_blocks(weight, second)
    return LowWeight(kind, values, scales, second)


def round_blocks(x: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """`x` f32 [..., n] in nvfp4: values f32 [..., n] and their blocks' scales f32 [..., n / 16] without `second`.

    ValueError if 16 does not divide n.
    """
    if x.shape[-1] % BLOCK:
        raise ValueError(f"a width of {x.shape[-1]} has no blocks of {BLOCK}")
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    scales = round_e4m3(blocks.abs().amax(-1) / (LARGEST["nvfp4"] * second))
    whole = (scales * second)[..., None]
    values = round_e2m1(torch.where(whole > 0, blocks / whole, torch.zeros(())))
    return values.flatten(-2), scales
