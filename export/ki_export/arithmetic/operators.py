"""The ONNX operators of our graphs in PyTorch, computed in the type of their inputs.

PyTorch rounds every float16 or bfloat16 result to that type (products are summed in float32 first, as tensor cores do
it), so overflow and rounding are those of an engine that takes the types literally. ONNX Runtime on a CPU widens
float16 instead and hides both. Definitions: onnx.ai/onnx/operators, opsets 18 to 23.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ki_edge.dtypes import BY_ONNX
from ki_edge.errors import ExportError

from .low_bits import DYNAMIC, LOW_TYPES, dequantize_linear, dynamic_quantize, quantize_linear

TYPES: Mapping[int, torch.dtype] = {  # by ONNX's number of the type
    **{number: getattr(torch, dtype.name) for number, dtype in BY_ONNX.items() if number not in LOW_TYPES},
    **LOW_TYPES,
}
Attributes = Mapping[str, Any]
Inputs = Sequence[Any]  # tensors, or None for an optional input that is left out
Operator = Callable[[Inputs, Attributes], tuple[Tensor, ...]]


def _elementwise(function: Callable[..., Tensor]) -> Operator:
    return lambda x, _: (function(*x),)


def _same(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """Two operands of one type, as ONNX and strongly typed engines demand: PyTorch would widen one silently."""

    def compute(x: Inputs, _: Attributes) -> tuple[Tensor, ...]:
        if x[0].dtype != x[1].dtype:
            raise ExportError(f"{name} of {x[0].dtype} and {x[1].dtype}: ONNX wants one type")
        return (function(x[0], x[1]),)

    return compute


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Summed in float32 and rounded once: exactly so, and faster than PyTorch's own 16-bit products on most CPUs."""
    if a.dtype in (torch.float16, torch.bfloat16):
        return (a.float() @ b.float()).to(a.dtype)
    return a @ b


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _gemm(x: Inputs, a: Attributes) -> tuple[Tensor, ...]:
    left, right = (t.mT if a.get(f"trans{side}", 0) else t for t, side in zip(x[:2], "AB", strict=True))
    if left.dtype != right.dtype:
        raise ExportError(f"Gemm of {left.dtype} and {right.dtype}: ONNX wants one type")
    if a.get("alpha", 1.0) != 1.0 or a.get("beta", 1.0) != 1.0:
        raise ExportError("Gemm with alpha or beta is not one of ours")
    product = _product(left, right)
    return (product if len(x) < 3 or x[2] is None else product + x[2],)


def _reshape(x: Inputs, a: Attributes) -> tuple[Tensor, ...]:
    dims = x[1].tolist()
    if not a.get("allowzero", 0):
        dims = [x[0].shape[i] if dim == 0 else dim for i, dim in enumerate(dims)]
    return (x[0].reshape(dims),)


def _unsqueeze(x: Inputs, _: Attributes) -> tuple[Tensor, ...]:
    y, axes = x[0], x[1].tolist()
    for axis in sorted(axis % (y.ndim + len(axes)) for axis in axes):
        y = y.unsqueeze(axis)
    return (y,)


def _squeeze(x: Inputs, _: Attributes) -> tuple[Tensor, ...]:
    axes = x[1].tolist() if len(x) > 1 and x[1] is not None else [i for i, size in enumerate(x[0].shape) if size == 1]
    return (x[0].squeeze(axes),)


def _gather(x: Inputs, a: Attributes) -> tuple[Tensor, ...]:
    data, places, axis = x[0], x[1].long(), a.get("axis", 0) % x[0].ndim
    places = torch.where(places < 0, places + data.shape[axis], places)
    taken = data.index_select(axis, places.reshape(-1))
    return (taken.reshape(*data.shape[:axis], *places.shape, *data.shape[axis + 1 :]),)


def _split(x: Inputs, a: Attributes) -> tuple[Tensor, ...]:
    axis = a.get("axis", 0)
    if len(x) > 1 and x[1] is not None:
        return tuple(x[0].split(x[1].tolist(), axis))
    return tuple(x[0].split(-(-x[0].shape[axis] // a["num_outputs"]), axis))


def _slice(x: Inputs, _: Attributes) -> tuple[Tensor, ...]:
    starts, ends = x[1].tolist(), x[2].tolist()
    axes = x[3].tolist() if len(x) > 3 and x[3] is not None else range(len(starts))
    steps = x[4].tolist() if len(x) > 4 and x[4] is not None else [1] * len(starts)
    where = [slice(None)] * x[0].ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        where[axis] = slice(start, end, step)
    return (x[0][tuple(where)],)


def _broadcast(shape: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(tuple(shape), tuple(other)))  # type: ignore[no-untyped-call]


def _reduce(function: Callable[..., Tensor]) -> Operator:
    def compute(x: Inputs, a: Attributes) -> tuple[Tensor, ...]:
        axes = x[1].tolist() if len(x) > 1 and x[1] is not None else list(range(x[0].ndim))
        return (function(x[0], dim=axes, keepdim=bool(a.get("keepdims", 1))),)

    return compute


def _layer_norm(x: Inputs, a: Attributes) -> tuple[Tensor, ...]:
    axis = a.get("axis", -1) % x[0].ndim
    bias = x[2] if len(x) > 2 else None
    return (F.layer_norm(x[0], x[0].shape[axis:], x[1], bias, a.get("epsilon", 1e-5)),)


def _convolution(x: Inputs, a: Attributes) -> tuple[Tensor, ...]:
    if any(a.get("pads", ())) or a.get("group", 1) != 1:
        raise ExportError("Conv with padding or groups is not one of ours")
    return (F.conv2d(x[0], x[1], x[2] if len(x) > 2 else None, stride=tuple(a["strides"])),)


def _cumulative_sum(x: Inputs, a: Attributes) -> tuple[Tensor, ...]:
    if a.get("exclusive", 0) or a.get("reverse", 0):
        raise ExportError("an exclusive or reverse CumSum is not one of ours")
    return (x[0].cumsum(int(x[1]), dtype=x[0].dtype),)


def _attention(x: Inputs, a: Attributes) -> tuple[Tensor, ...]:
    """Attention(23) on q [B,heads,Q,D], k, v [B,kv heads,S,D] and a mask to add; the softmax in float32."""
    q, k, v = x[:3]
    if a.get("is_causal", 0) or a.get("softcap", 0.0) or q.shape[1] % k.shape[1]:
        raise ExportError("causal or capped Attention is not one of ours")
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scale = math.sqrt(a.get("scale", 1.0 / math.sqrt(q.shape[-1])))  # onto both factors, as the operator says
    scores = ((q * scale) @ (k * scale).mT).float()
    if len(x) > 3 and x[3] is not None:
        scores = scores.masked_fill(~x[3], -math.inf) if x[3].dtype == torch.bool else scores + x[3].float()
    return (scores.softmax(-1).to(v.dtype) @ v,)


OPERATORS: Mapping[str, Operator] = {
    "Add": _same("Add", torch.add),
    "Sub": _same("Sub", torch.sub),
    "Mul": _same("Mul", torch.mul),
    "Div": _same("Div", _divide),
    "MatMul": _same("MatMul", _product),
    "LessOrEqual": _same("LessOrEqual", torch.le),
    "And": _same("And", torch.logical_and),
    "Pow": lambda x, _: (x[0] ** x[1].to(x[0].dtype),),
    "Sqrt": _elementwise(torch.sqrt),
    "Neg": _elementwise(torch.neg),
    "Cos": _elementwise(torch.cos),
    "Sin": _elementwise(torch.sin),
    "Sigmoid": _elementwise(torch.sigmoid),
    "Gelu": lambda x, a: (F.gelu(x[0], approximate=a.get("approximate", "none")),),
    "Softmax": lambda x, a: (x[0].softmax(a.get("axis", -1)),),
    "Where": lambda x, _: (torch.where(x[0], x[1], x[2]),),
    "Cast": lambda x, a: (x[0].to(TYPES[a["to"]]),),
    "Gemm": _gemm,
    "Conv": _convolution,
    "LayerNormalization": _layer_norm,
    "Attention": _attention,
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "CumSum": _cumulative_sum,
    "Shape": lambda x, a: (torch.tensor(x[0].shape[a.get("start", 0) : a.get("end")], dtype=torch.int64),),
    "Range": lambda x, _: (torch.arange(x[0].item(), x[1].item(), x[2].item(), dtype=x[0].dtype),),
    "Expand": lambda x, _: (x[0].expand(_broadcast(x[0].shape, x[1].tolist())),),
    "Reshape": _reshape,
    "Transpose": lambda x, a: (x[0].permute(*a.get("perm", range(x[0].ndim - 1, -1, -1))),),
    "Concat": lambda x, a: (torch.cat(list(x), a["axis"]),),
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Identity": lambda x, _: (x[0],),
    "QuantizeLinear": quantize_linear,
    "DequantizeLinear": dequantize_linear,
}
CUSTOM: Mapping[str, Mapping[str, Operator]] = {"trt": {DYNAMIC: dynamic_quantize}}  # by domain
