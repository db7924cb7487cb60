"""The two sides of a comparison: the bundle's graphs under ONNX Runtime (16-bit ones in exact arithmetic), and PyTorch.

Small models are held whole on both sides. Of large ones both sides hold a few layers at a time: the model reads each
layer's weights as it runs, the graphs run in segments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ki_edge import graphs
from ki_edge.bundle import Bundle
from ki_edge.checkpoints import Checkpoint
from ki_edge.checkpoints.layout.keys import parameter_shapes
from ki_edge.config import Pi05Config
from ki_edge.graphs import GraphSpec
from ki_edge.model import PiModel, load_model
from ki_edge.model.streaming import streamed
from ki_edge.progress import Progress, available_memory
from ki_export.arithmetic.session import SIXTEEN_BITS, arithmetic_sessions
from ki_runtime.backends.registry import Backend, SessionOptions, choose_backend, connect, open_session
from ki_runtime.backends.session import Session
from ki_runtime.policy.sampler import Sampler

from .bars import Bar, bars_of
from .segments import SegmentedSession, SegmentPool

Array = npt.NDArray[Any]
Method = Literal["resident", "streamed"]
PASSING = 300_000_000  # bytes of the reference's weights in memory beside 16-bit graphs: its layers pass through
RESIDENT = 2_000_000_000  # bytes of float32 weights up to which a model is held whole
COPIES = 3  # of the weights, at most, while a whole model is compared: the model's, the graphs', and room to compute


class Sides:
    """Both sides, opened. `bars`: what the graphs are held to; `has_fast`: whether FAST decoding is compared."""

    def __init__(
        self,
        bundle: Bundle,
        model: PiModel,
        open_graph: Callable[[GraphSpec], Session],
        method: Method,
        *,
        has_fast: bool | None = None,
    ) -> None:
        self.bundle, self.model, self.method = bundle, model, method
        self.has_fast = bundle.manifest.has_fast if has_fast is None else has_fast
        self.bars: Mapping[str, Bar] = bars_of(bundle.manifest.precision)
        wanted = graphs.specs(model.config, fast=self.has_fast)
        self._sessions = {spec.name: open_graph(spec) for spec in wanted}
        self.sampler = Sampler(bundle, lambda spec: self._sessions[spec.name])

    def run(self, spec: GraphSpec, *tensors: Tensor) -> dict[str, Array]:
        """One graph on the reference's tensors, given in the contract's order."""
        feeds = {
            wanted.name: np.array(tensor.numpy(), wanted.dtype, order="C")
            for wanted, tensor in zip(spec.inputs, tensors, strict=True)
        }
        return self._sessions[spec.name].run(feeds)

    def steps(self, layers: int, **runs: int) -> int | None:
        """Progress steps of so many `layers` of the model and so many `runs` of each graph; None if none are told."""
        if self.method == "resident":
            return None
        counts = {n: len(s.segments) for n, s in self._sessions.items() if isinstance(s, SegmentedSession)}
        return layers + sum(counts.get(name, 0) * count for name, count in runs.items())


def open_sides(bundle: Bundle, checkpoint: Checkpoint, method: Method, progress: Progress) -> Sides:
    """A bundle and its checkpoint's model, held whole or in pieces."""
    if method == "resident":
        model = load_model(checkpoint, dtype=torch.float32)
        if bundle.manifest.precision in SIXTEEN_BITS:
            return Sides(bundle, model, arithmetic_sessions(bundle, budget=RESIDENT), method)
        backend = choose_backend("ort")
        return Sides(bundle, model, lambda spec: open_session(bundle, spec, backend, SessionOptions()), method)
    if bundle.manifest.precision in SIXTEEN_BITS:
        model = streamed(checkpoint, budget=PASSING, on_layer=progress.step)
        return Sides(bundle, model, arithmetic_sessions(bundle), method)
    pool = SegmentPool(bundle.path, on_run=progress.step)
    model = streamed(checkpoint, on_layer=progress.step)
    return Sides(bundle, model, lambda spec: SegmentedSession(bundle, spec, pool), method)


def open_engine(
    bundle: Bundle, checkpoint: Checkpoint, method: Method, progress: Progress, backend: str
) -> tuple[Sides, Backend]:
    """The same with a bundle as a backend of the runtime computes it, and which; proven or not.

    FAST decoding is compared where the contract has it: engines of other policies are built without.
    """
    connection = connect(bundle, backend, SessionOptions(say=progress.say))
    if method == "resident":
        model = load_model(checkpoint, dtype=torch.float32)
    else:
        model = streamed(checkpoint, budget=PASSING, on_layer=progress.step)
    contract = bundle.manifest.contract
    has_fast = bundle.manifest.has_fast and contract is not None and contract.get("fast") is not None
    return Sides(bundle, model, connection.open, method, has_fast=has_fast), connection.backend


def choose_method(config: Pi05Config, available: int | None = None) -> Method:
    """Whether to hold a model whole. `available`: bytes of free memory, None to ask this machine."""
    size = 4 * sum(math.prod(shape) for shape in parameter_shapes(config).values())
    available = available_memory() if available is None else available
    return "streamed" if size > RESIDENT or (available is not None and COPIES * size > available) else "resident"
