"""After a failed bar: which weight differs from the checkpoint, and which layer is the first to go wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from torch import Tensor, nn

from ki_edge.bundle import Bundle
from ki_edge.errors import CheckpointError
from ki_edge.model import Checkpoint, Pi05
from ki_edge.model.checkpoint import checkpoint_key
from ki_edge.safetensors_index import SafetensorsIndex

from .safetensors_writer import PIECE, widen
from .wrappers import UNEMBEDDING

Array = npt.NDArray[Any]
LAYER_BAR = 2e-5  # times the layer's largest output: below it an error is rounding
LAYERS = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.Embedding)


def changed_weights(bundle: Bundle, checkpoint: Checkpoint) -> list[str]:
    """Checkpoint keys whose values in the bundle are not the checkpoint's. Reads both files whole."""
    stored = bundle.weights()
    keys = {key: str(name) for key, name in bundle.manifest.weights["runtime"].items()}
    for graph in bundle.manifest.graphs:
        proto = onnx.load(bundle.graph(graph), load_external_data=False)
        for tensor in proto.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL and not tensor.name.startswith(UNEMBEDDING):
                key = checkpoint_key(tensor.name)
                keys[key] = checkpoint.keys[key]
    return [key for key, name in keys.items() if not _equal(stored, name, checkpoint, key)]


def _equal(stored: SafetensorsIndex, name: str, checkpoint: Checkpoint, key: str) -> bool:
    try:
        ours, theirs = stored.raw(name), checkpoint.index.raw(checkpoint.keys[key])
    except (CheckpointError, KeyError):
        return False
    dtype = checkpoint.entry(key).dtype
    width = 4 if dtype == "F32" else 2
    for start in range(0, theirs.size // width, PIECE):
        expected = widen(theirs[start * width : (start + PIECE) * width], dtype)
        if ours[start * 4 : (start + PIECE) * 4].tobytes() != expected.tobytes():
            return False
    return True


def first_wrong_layer(
    bundle: Bundle, graph: str, feeds: Mapping[str, Array], model: Pi05, run: Callable[[], object]
) -> str | None:
    """Name of the first layer whose output differs, or None if every layer is within rounding.

    `run` makes the model compute what `graph` computes from `feeds`.
    """
    with _recorded(model) as expected:
        run()
    proto = onnx.load(bundle.graph(graph), load_external_data=False)
    order = [name for node in proto.graph.node for name in node.output if name in expected]
    ours = _outputs(bundle, proto, order, feeds)
    for name, given in zip(order, ours, strict=True):
        reference = expected[name].reshape(-1)
        error = float(np.abs(given.reshape(-1) - reference).max()) if given.size == reference.size else np.inf
        if not error <= LAYER_BAR * max(1.0, float(np.abs(reference).max())):
            return str(name)
    return None


def _outputs(bundle: Bundle, proto: Any, names: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
    """Values inside a graph. The graph is run from memory, its weights from the bundle's folder."""
    present = {output.name for output in proto.graph.output}
    for name in names:
        if name not in present:
            proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(list(names), dict(feeds)))


@contextmanager
def _recorded(model: Pi05) -> Iterator[dict[str, Array]]:
    """Outputs of the model's layers by name, filled while the block runs."""
    outputs: dict[str, Array] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, inputs, output: outputs.update({name: output.detach().numpy().copy()})

    handles = [
        module.register_forward_hook(keep(name)) for name, module in model.named_modules() if isinstance(module, LAYERS)
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
