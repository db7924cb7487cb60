"""The ONNX checker and strict shape inference over a saved graph whose weights lie in a hard-linked file."""

from __future__ import annotations

import math
from pathlib import Path

import onnx
import onnx_ir as ir

from ki_edge.errors import ExportError


def check(path: Path) -> None:
    """ExportError unless the graph is valid ONNX and every weight it refers to lies within the weights file.

    onnx itself takes a file with several hard links for an attack, so weights are declared as inputs for its checks,
    and their places are checked here.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    stored = [tensor for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    for tensor in stored:
        _check_place(path, tensor)
        graph.initializer.remove(tensor)
        graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        first = str(error).strip().split("\n", 1)[0]
        raise ExportError(f"graph {path.stem}: the ONNX checker refuses it: {first}") from error


def _check_place(path: Path, tensor: onnx.TensorProto) -> None:
    place = {entry.key: entry.value for entry in tensor.external_data}
    offset, length = int(place["offset"]), int(place["length"])
    size = (path.parent / place["location"]).stat().st_size
    width = ir.DataType(tensor.data_type).itemsize  # half a byte of four bits
    if length != math.ceil(width * math.prod(tensor.dims)) or offset + length > size:
        raise ExportError(
            f"graph {path.stem}: '{tensor.name}' {list(tensor.dims)} at bytes {offset}..{offset + length} does not fit "
            f"{place['location']} of {size} bytes"
        )
