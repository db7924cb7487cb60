"""What a graph asks of TensorRT, as the bundle's manifest records it, told before anything is built.

The table holds what the parser of TensorRT 10.3 does not import; everything else that the exporter writes, it does.
RTX has its own version numbers and imports all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ki_edge.bundle import Bundle
from ki_edge.errors import BackendError, BundleError

from .api import Api

# Operator -> first TensorRT that imports it; None: no version does.
OPERATORS: dict[str, tuple[int, int] | None] = {
    "Attention": (10, 14),
    "RMSNormalization": (10, 15),
    "RotaryEmbedding": (10, 15),
    "TensorScatter": (10, 15),
    "ConvInteger": None,
    "DynamicQuantizeLinear": None,
    "MatMulInteger": None,
    "QLinearMatMul": None,
    "SequenceAt": None,
    "SplitToSequence": None,
    "com.microsoft.MatMulNBits": None,
}
# Newest opset, and the first TensorRT whose parser knows it.
OPSETS: tuple[tuple[int, tuple[int, int]], ...] = ((20, (10, 3)), (22, (10, 6)), (23, (10, 11)), (24, (10, 13)))


def weight_bytes(bundle: Bundle, name: str) -> int:
    """Of all weights of a graph, shared ones once. BundleError if its export did not record them."""
    found = bundle.manifest.graphs[name].get("weight_bytes")
    if found is None:
        raise BundleError(
            f"{bundle.path}: the manifest does not say how large the weights of graph {name} are, since an earlier "
            "version exported it: export the checkpoint again to build engines"
        )
    return int(found)


def check_graph(api: Api, name: str, graph: Mapping[str, Any]) -> None:
    """BackendError naming the operator or opset of graph `name` that this TensorRT does not import, and the cure.

    `graph`: its entry in the manifest.
    """
    for operator in graph.get("ops", ()):
        first = OPERATORS.get(operator, (0, 0))
        if first is None:
            raise BackendError(
                f"graph {name}: no TensorRT imports {operator}: export the checkpoint again with --target trt"
            )
        if not api.is_rtx and api.version < first:
            raise BackendError(
                f"graph {name}: {operator} needs TensorRT {_text(first)}, installed is {api.version_text}: install a "
                "newer one, or export with --attention decomposed"
            )
    opset = graph.get("opset", 0)
    known = next((first for newest, first in OPSETS if opset <= newest), None)
    if known is None or (not api.is_rtx and api.version < known):
        needed = "a newer TensorRT than exists yet" if known is None else f"TensorRT {_text(known)}"
        raise BackendError(
            f"graph {name}: opset {opset} needs {needed}, installed is {api.version_text}: export with --opset 20"
        )


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
