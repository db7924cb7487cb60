"""What a graph asks of TensorRT and of the GPU, told before anything is built.

The table holds what the parser of TensorRT 10.3 does not import; everything else that the exporter writes, it does.
RTX has its own version numbers and imports all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    "com.microsoft.MatMulIntegerToFloat": None,
    "com.microsoft.MatMulNBits": None,
    "com.microsoft.RotaryEmbedding": None,
}
# Newest opset, and the first TensorRT whose parser knows it.
OPSETS: tuple[tuple[int, tuple[int, int]], ...] = ((20, (10, 3)), (22, (10, 6)), (23, (10, 11)), (24, (10, 13)))


@dataclass(frozen=True)
class GraphFacts:
    """What the manifest says of a graph; `weight_bytes`: at their declared types, of what is shared once."""

    opset: int
    operators: Sequence[str]
    weight_bytes: int


def graph_facts(bundle: Bundle, name: str) -> GraphFacts:
    """Of a graph whose file was looked at. BundleError if it is damaged, or if the manifest does not tell."""
    bundle.graph(name)
    found = bundle.manifest.graphs[name]
    lacking = [field for field in ("opset", "ops", "weight_bytes") if field not in found]
    if lacking:
        what = f"the {lacking[0]} of graph {name}"
        raise BundleError(f"{bundle.path}: the manifest lacks {what}: export the checkpoint again")
    return GraphFacts(found["opset"], found["ops"], found["weight_bytes"])


def check_graph(api: Api, name: str, graph: GraphFacts) -> None:
    """BackendError naming the operator or opset of graph `name` that this TensorRT does not import, and the cure."""
    for operator in graph.operators:
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
    known = next((first for newest, first in OPSETS if graph.opset <= newest), None)
    if known is None or (not api.is_rtx and api.version < known):
        needed = "a newer TensorRT than exists yet" if known is None else f"TensorRT {_text(known)}"
        raise BackendError(
            f"graph {name}: opset {graph.opset} needs {needed}, installed is {api.version_text}: export with --opset 20"
        )


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
