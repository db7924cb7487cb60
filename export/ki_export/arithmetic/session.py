"""A bundle's graph behind the runtime's session interface, computed in exactly the types that the graph declares.

Not for robots: it is the reference of what a float16 or bfloat16 engine may do, where no GPU is at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch

from ki_edge import graphs
from ki_edge.bundle import Bundle
from ki_edge.dtypes import LOW_PRECISIONS
from ki_edge.graphs import GraphSpec
from ki_runtime.backends.session import Binding, Buffer, HostBuffer, Session
from ki_runtime.policy.sampler import Sampler

from .evaluator import BUDGET, Evaluator, Shelf, WeightReader
from .readers import FileWeights

ROUNDED = ("float16", "bfloat16", *LOW_PRECISIONS.values())  # of graphs that ONNX Runtime's CPU would widen


class ArithmeticSession(Session):
    """One evaluated graph. `weights` may be shared by several."""

    def __init__(self, bundle: Bundle, spec: GraphSpec, weights: WeightReader) -> None:
        manifest = bundle.manifest
        super().__init__(spec, graphs.sizes(manifest.config, len(manifest.vocabulary.ids)))
        self._evaluator = Evaluator(ir.load(bundle.graph(spec.name)).graph, weights)

    def allocate(self, shape: Sequence[int], dtype: str) -> Buffer:
        return HostBuffer(np.zeros(shape, dtype))

    def _bind(self, buffers: Mapping[str, Buffer]) -> Binding:
        return _ArithmeticBinding(self, buffers)

    def compute(self, buffers: Mapping[str, Buffer]) -> None:
        """Read the inputs' buffers, write the outputs'."""
        arrays = {}
        for name, buffer in buffers.items():
            assert isinstance(buffer, HostBuffer)
            arrays[name] = buffer.array
        feed = {tensor.name: torch.from_numpy(np.ascontiguousarray(arrays[tensor.name])) for tensor in self.inputs}
        (found,) = self._evaluator.run([feed])
        for tensor in self.outputs:
            np.copyto(arrays[tensor.name], found[tensor.name].numpy())


class _ArithmeticBinding:
    def __init__(self, session: ArithmeticSession, buffers: Mapping[str, Buffer]) -> None:
        self._session, self._buffers = session, buffers

    def run(self) -> None:
        self._session.compute(self._buffers)


def arithmetic_sessions(bundle: Bundle, *, budget: int = BUDGET) -> Callable[[GraphSpec], ArithmeticSession]:
    """Opens the graphs of a bundle; together they hold at most `budget` bytes of weights, or one weight."""
    weights = Shelf(FileWeights(bundle.path), budget)
    return lambda spec: ArithmeticSession(bundle, spec, weights)


def arithmetic_sampler(bundle: Bundle) -> Sampler:
    """A bundle as a model that computes in its declared types, all weights in memory as they are used."""
    return Sampler(bundle, arithmetic_sessions(bundle, budget=1 << 40))
