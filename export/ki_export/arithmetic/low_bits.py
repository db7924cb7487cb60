"""Operators of eight and four bits, as ONNX (opsets 19 to 23) and TensorRT define them, and the products between them.

A product of two dequantised operands is one kernel on a GPU: the low values are multiplied and summed, in int32 or
float32, and the scales come after the sum. Every product of two values is exact, and so are the sums of int8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ki_edge.errors import ExportError
from ki_export.weights.rounding import BLOCK, round_blocks, round_e2m1, round_e4m3, times_blocks

INT8, E4M3, E2M1 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2
"""PyTorch's types of low values. It has no unpacked e2m1; e5m2, of no other use here, holds all its numbers."""
LOW = (INT8, E4M3, E2M1)
LOW_TYPES: Mapping[int, torch.dtype] = {3: INT8, 17: E4M3, 23: E2M1}  # by ONNX's numbers
EXACT = 1024  # int8 products whose sum float32 holds exactly: 1024 * 128 * 128 = 2^24
DYNAMIC = "TRT_FP4DynamicQuantize"
Attributes = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class LowOperand:
    """One side of a product: about `unscaled` * `factor`.

    `unscaled` f32 of exact low values, in nvfp4 times their blocks' e4m3 scales; `factor` f32 [], or one an output.
    """

    unscaled: Tensor
    factor: Tensor
    whole: bool  # whether the values are those of int8


def quantize_linear(x: Sequence[Any], a: Attributes) -> tuple[Tensor, ...]:
    """QuantizeLinear to int8, e4m3 or e2m1: a scale for all, for each index of an axis, or for blocks along it."""
    given, scale, zero = x[0], x[1], x[2] if len(x) > 2 else None
    dtype = LOW_TYPES.get(a.get("output_dtype", 0), None if zero is None else zero.dtype)
    if dtype not in LOW:
        raise ExportError(f"QuantizeLinear to {dtype} is not one of ours")
    _zero_point(zero)
    if scale.dtype != given.dtype and scale.dtype != torch.float32:
        raise ExportError(f"QuantizeLinear of {given.dtype} with a scale of {scale.dtype}: ONNX wants one type")
    scaled = (given / _expand(scale, given, a)).float()
    return (_round(scaled, dtype),)


def dequantize_linear(x: Sequence[Any], a: Attributes) -> tuple[Tensor, ...]:
    """DequantizeLinear, computed in float32 and rounded to the scale's type, or to `output_dtype`."""
    given, scale = x[0], x[1]
    if given.dtype not in LOW:
        raise ExportError(f"DequantizeLinear of {given.dtype} is not one of ours")
    _zero_point(x[2] if len(x) > 2 else None)
    found = given.float() * _expand(scale, given, a).float()
    return (found.to(_FLOATS.get(a.get("output_dtype", 0), scale.dtype)),)


_FLOATS = {1: torch.float32, 10: torch.float16, 16: torch.bfloat16}


def dynamic_quantize(x: Sequence[Any], a: Attributes) -> tuple[Tensor, ...]:
    """TensorRT's: e2m1 values, and e4m3 scales of blocks of 16 along the last axis, beside a given scale for all."""
    given, second = x[0], x[1].float()
    if a.get("axis", -1) not in (-1, given.ndim - 1) or a.get("block_size", BLOCK) != BLOCK:
        raise ExportError(f"{DYNAMIC} is ours along the last axis in blocks of {BLOCK}")
    values, scales = round_blocks(given.float(), second)
    return values.to(E2M1), scales.to(E4M3)


def low_product(left: LowOperand, right: LowOperand, dtype: torch.dtype) -> Tensor:
    """left [..., m, k] times right [..., k, n], rounded once, to `dtype`."""
    a, b = left.unscaled, right.unscaled
    total = _whole(a, b) if left.whole and right.whole else a @ b
    return (total * (left.factor * right.factor)).to(dtype)


def _whole(a: Tensor, b: Tensor) -> Tensor:
    """The product of whole numbers, summed exactly, in float32."""
    if a.shape[-1] <= EXACT:
        return a @ b
    parts = zip(torch.split(a, EXACT, -1), torch.split(b, EXACT, -2), strict=True)
    return torch.stack([(x @ y).int() for x, y in parts]).sum(0, dtype=torch.int32).float()


def operand(values: Tensor, scale: Tensor, a: Attributes, second: Tensor | None = None) -> LowOperand:
    """What a DequantizeLinear gives to a product. `second`: the scale of `scale` itself, of nvfp4."""
    if second is None:
        return _plain(values, scale, a)
    if a.get("block_size", 0) != BLOCK or a.get("axis", 1) % values.ndim != values.ndim - 1:
        raise ExportError(f"a product of blocks is ours along the last axis in blocks of {BLOCK}")
    return LowOperand(times_blocks(values.float(), scale.float()), second.float(), whole=False)


def _plain(values: Tensor, scale: Tensor, a: Attributes) -> LowOperand:
    if a.get("block_size", 0):
        return LowOperand(values.float() * _expand(scale, values, a).float(), torch.ones(()), whole=False)
    if scale.numel() > 1 and a.get("axis", 1) % values.ndim != 0:
        raise ExportError("a product of a weight with scales along its inputs is not one of ours")
    return LowOperand(values.float(), scale.float().reshape(scale.shape), whole=values.dtype == INT8)


def _expand(scale: Tensor, x: Tensor, a: Attributes) -> Tensor:
    """A scale in the shape that multiplies `x`."""
    if scale.numel() == 1:
        return scale.reshape(())
    axis, block = a.get("axis", 1) % x.ndim, a.get("block_size", 0)
    if block:
        return scale.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    if scale.ndim != 1 or len(scale) != x.shape[axis]:
        raise ExportError(f"{list(scale.shape)} scales do not fit axis {axis} of {list(x.shape)}")
    return scale.reshape([-1 if i == axis else 1 for i in range(x.ndim)])


def _round(scaled: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == INT8:
        return scaled.round().clamp(-128, 127).to(INT8)
    return (round_e4m3(scaled) if dtype == E4M3 else round_e2m1(scaled)).to(dtype)


def _zero_point(zero: Tensor | None) -> None:
    if zero is not None and bool((zero.float() != 0).any()):
        raise ExportError("a zero point other than 0 is not one of ours")
