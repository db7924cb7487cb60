"""The table of types against the packages that it speaks of."""

import json
import struct

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.numpy import save as save_numpy
from safetensors.torch import save as save_torch

from ki_edge.dtypes import BFLOAT16, DTYPES, FLOAT8, FLOATS, KNOWN_PRECISIONS, LOW_PRECISIONS, PRECISIONS
from ki_runtime.backends.ort import onnxruntime

OURS = (BFLOAT16, FLOAT8)  # whose bits numpy knows as whole numbers alone


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_every_package_means_the_same_type(dtype):
    wanted = torch.bfloat16 if dtype is BFLOAT16 else getattr(torch, dtype.name)
    assert wanted.itemsize == dtype.nbytes == ir.DataType(dtype.onnx).itemsize
    assert onnx.TensorProto.DataType.Name(dtype.onnx) == ir.DataType(dtype.onnx).name
    found = onnx.helper.tensor_dtype_to_np_dtype(dtype.onnx)
    assert found.name == dtype.name and (dtype in OURS or found == np.dtype(dtype.numpy))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_safetensors_writes_the_name(dtype):
    tensor = torch.zeros(1, dtype=getattr(torch, dtype.name)) if dtype in OURS else np.zeros(1, dtype.numpy)
    content = save_torch({"x": tensor}) if dtype in OURS else save_numpy({"x": tensor})
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert header["x"]["dtype"] == dtype.stored and header["x"]["data_offsets"] == [0, dtype.nbytes]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_onnxruntime_calls_it_so(dtype):
    value = onnx.helper.make_tensor_value_info("x", dtype.onnx, [1])
    out = onnx.helper.make_tensor_value_info("y", dtype.onnx, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value], [out])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    session = onnxruntime().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].type == f"tensor({dtype.ort})"


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.trt], ids=lambda dtype: dtype.name)
def test_tensorrt_calls_it_so(dtype):
    trt = pytest.importorskip("tensorrt_rtx")
    assert getattr(trt.DataType, dtype.trt).itemsize == dtype.nbytes


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.exponent], ids=lambda dtype: dtype.name)
def test_exponents_are_those_of_infinity(dtype):
    infinity = torch.tensor([torch.inf], dtype=getattr(torch, dtype.name)).view(torch.uint8).numpy().tobytes()
    assert int.from_bytes(infinity, "little") == dtype.exponent


def test_weights_and_precisions():
    assert list(FLOATS) == ["F32", "BF16", "F16"]
    assert {short: dtype.name for short, dtype in PRECISIONS.items()} == {
        "fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8"
    }  # fmt: skip
    assert LOW_PRECISIONS == {"int8": "int8_static", "fp8": "float8", "nvfp4": "nvfp4"}
    assert len(set(KNOWN_PRECISIONS)) == len(KNOWN_PRECISIONS) == 7
