"""The types that a tensor's elements may have, and what each is called where; the only table of them.

Numbers and names alone, so that a robot can read it: `getattr(torch, dtype.name)`, `onnx_ir.DataType(dtype.onnx)` and
`getattr(tensorrt.DataType, dtype.trt)` are made by those who have these packages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class DType:
    """One type.

    `name`: numpy's, PyTorch's and the manifest's; `stored`: safetensors'; `numpy`: of its bytes, little-endian, of
    bfloat16 and float8 the bits; `onnx`: the number in onnx.proto; `ort` and `trt`: ONNX Runtime's and TensorRT's
    names; `short`: on the command line, where it is a precision; `exponent`: the bits that are all set in infinities
    and NaN.
    """

    name: str
    stored: str
    numpy: str
    onnx: int
    ort: str
    trt: str = ""
    short: str = ""
    exponent: int = 0

    @property
    def nbytes(self) -> int:
        """Of one element."""
        return np.dtype(self.numpy).itemsize


FLOAT32 = DType("float32", "F32", "<f4", 1, "float", "FLOAT", "fp32", 0x7F800000)
FLOAT16 = DType("float16", "F16", "<f2", 10, "float16", "HALF", "fp16", 0x7C00)
BFLOAT16 = DType("bfloat16", "BF16", "<u2", 16, "bfloat16", "BF16", "bf16", 0x7F80)
INT8 = DType("int8", "I8", "i1", 3, "int8", "INT8", "int8")
FLOAT8 = DType("float8_e4m3fn", "F8_E4M3", "u1", 17, "float8e4m3fn", "FP8")
DTYPES = (
    FLOAT32,
    FLOAT16,
    BFLOAT16,
    INT8,
    FLOAT8,
    DType("float64", "F64", "<f8", 11, "double", exponent=0x7FF0000000000000),
    DType("bool", "BOOL", "?", 9, "bool", "BOOL"),
    DType("uint8", "U8", "u1", 2, "uint8", "UINT8"),
    DType("int16", "I16", "<i2", 5, "int16"),
    DType("uint16", "U16", "<u2", 4, "uint16"),
    DType("int32", "I32", "<i4", 6, "int32", "INT32"),
    DType("uint32", "U32", "<u4", 12, "uint32"),
    DType("int64", "I64", "<i8", 7, "int64", "INT64"),
    DType("uint64", "U64", "<u8", 13, "uint64"),
)
BY_NAME: Mapping[str, DType] = {dtype.name: dtype for dtype in DTYPES}
STORED: Mapping[str, DType] = {dtype.stored: dtype for dtype in DTYPES}
BY_ONNX: Mapping[int, DType] = {dtype.onnx: dtype for dtype in DTYPES}
FLOATS = {dtype.stored: dtype for dtype in (FLOAT32, BFLOAT16, FLOAT16)}  # that a checkpoint's weights may have
PRECISIONS: Mapping[str, DType] = {dtype.short: dtype for dtype in DTYPES if dtype.short}  # of matrix products
# precisions of engines whose weights are stored low: on the command line -> in the manifest
LOW_PRECISIONS: Mapping[str, str] = {"int8": "int8_static", "fp8": "float8", "nvfp4": "nvfp4"}
KNOWN_PRECISIONS = (*(dtype.name for dtype in PRECISIONS.values()), *LOW_PRECISIONS.values())  # of the manifest
