"""After a failed bar: which layer is the first to go wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from ki_edge.bundle import Bundle
from ki_edge.dtypes import LOW_PRECISIONS
from ki_edge.model import PiModel
from ki_edge.model.streaming import EmbeddingRows
from ki_export.arithmetic.evaluator import Evaluator, Shelf
from ki_export.arithmetic.readers import FileWeights
from ki_export.arithmetic.session import ROUNDED
from ki_runtime.backends.backend import SessionOptions
from ki_runtime.backends.ort import load, weight_layout

Array = npt.NDArray[Any]
FLOAT = onnx.TensorProto.FLOAT
SAMPLED = ".sampled"
# times the layer's largest output: below it an error is rounding, or that of the layers before it
LAYER_BARS = {
    "float32": 2e-5,
    "int8": 0.5,
    "float16": 2e-2,
    "bfloat16": 0.2,
    **dict.fromkeys(LOW_PRECISIONS.values(), 1.0),
}
LAYERS = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.Embedding, EmbeddingRows)
SAMPLES = 1 << 18  # values kept of a layer's output, so that those of a large model fit into memory
PRIMES = (1, 2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103)


def first_wrong_layer(
    bundle: Bundle, graph: str, feeds: Mapping[str, Array], model: PiModel, run: Callable[[], object]
) -> str | None:
    """Name of the first layer whose output differs, or None if every layer is within rounding.

    `run` makes the model compute what `graph` computes from `feeds`.
    """
    bar = LAYER_BARS[bundle.manifest.precision]
    with _recorded(model) as expected:
        run()
    if bundle.manifest.precision in ROUNDED:
        return _first_wrong_value(bundle, graph, feeds, expected, bar)
    watched = _watched(bundle.graph(graph), {name: size for name, (size, _) in expected.items()})
    options = SessionOptions(prepack=False)
    layout = weight_layout(bundle, graph, options)
    engine = load(watched.SerializeToString(), options, layout, folder=bundle.path)
    names: list[str] = [value.name for value in watched.graph.output]
    for name, given in zip(names, engine.run(names, dict(feeds)), strict=True):
        layer = name.removesuffix(SAMPLED)
        if not _close(given, expected[layer][1], bar):
            return layer
    return None


def _watched(path: Path, sizes: Mapping[str, int]) -> onnx.ModelProto:
    """A graph that gives a sample of each float32 value among `sizes` (its number of elements), in order, alone.

    Whole, the outputs of all layers of a large model would take gigabytes.
    """
    model = onnx.load(path, load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model).graph
    floats = {v.name for v in (*inferred.value_info, *inferred.output) if v.type.tensor_type.elem_type == FLOAT}
    made = [name for node in model.graph.node for name in node.output if name in floats and name in sizes]
    numbers = {"all": -1, "start": 0, "stop": np.iinfo(np.int64).max, **{f"{prime}": prime for prime in PRIMES}}
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.array([number], np.int64), f"sampling.{name}")
        for name, number in numbers.items()
    )
    del model.graph.output[:]
    for name in made:
        bounds = ["sampling.start", "sampling.stop", "", f"sampling.{stride(sizes[name])}"]
        flatten = onnx.helper.make_node("Reshape", [name, "sampling.all"], [f"{name}.flat"])
        model.graph.node.extend([flatten, onnx.helper.make_node("Slice", [f"{name}.flat", *bounds], [name + SAMPLED])])
        model.graph.output.append(onnx.helper.make_tensor_value_info(name + SAMPLED, FLOAT, None))
    return model


def _first_wrong_value(
    bundle: Bundle, graph: str, feeds: Mapping[str, Array], expected: Mapping[str, tuple[int, Array]], bar: float
) -> str | None:
    """The same in the arithmetic of a 16-bit graph."""
    wrong: list[str] = []

    def watch(node: ir.Node, _: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> None:
        for value, tensor in zip(node.outputs, outputs, strict=True):
            name = str(value.name)
            if name in expected and not _close(sample(tensor.float().numpy()), expected[name][1], bar):
                wrong.append(name)

    evaluator = Evaluator(ir.load(bundle.graph(graph)).graph, Shelf(FileWeights(bundle.path)))
    evaluator.run([{name: torch.from_numpy(array) for name, array in feeds.items()}], watch)
    return wrong[0] if wrong else None


def _close(given: Array, expected: Array, bar: float) -> bool:
    if given.shape != expected.shape:
        return False
    error = float(np.abs(given - expected).max(initial=0.0))
    return error <= bar * max(1.0, float(np.abs(expected).max(initial=0.0)))


def sample(values: Array) -> Array:
    """Every value of a small array, flat; of a large one every p-th, p prime so that no column is left out."""
    return values.reshape(-1)[:: stride(values.size)].copy()


def stride(size: int) -> int:
    """The p of `sample`, for an array of `size` values."""
    return next((prime for prime in PRIMES if size <= prime * SAMPLES), PRIMES[-1])


@contextmanager
def _recorded(model: PiModel) -> Iterator[dict[str, tuple[int, Array]]]:
    """(size, sample) of the outputs of the model's layers by name, filled while the block runs."""
    outputs: dict[str, tuple[int, Array]] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            outputs[name] = output.numel(), sample(output.detach().numpy())

        return hook

    handles = [
        module.register_forward_hook(keep(name)) for name, module in model.named_modules() if isinstance(module, LAYERS)
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
