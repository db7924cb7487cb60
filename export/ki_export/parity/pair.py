"""The two sides of a comparison: the bundle's graphs under ONNX Runtime (16-bit ones in exact arithmetic), and PyTorch.

The graphs are opened as on a robot, weights mapped from the bundle's file. The model is held whole if it is small; a
large one reads each layer's weights as it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
from ki_edge.model.streaming import BUDGET, streamed
from ki_edge.proc import available_memory
from ki_edge.progress import Progress
from ki_export.arithmetic.session import ROUNDED, arithmetic_sessions
from ki_runtime.backends.backend import Backend, SessionOptions
from ki_runtime.backends.registry import choose_backend, connect, open_session
from ki_runtime.backends.session import Session
from ki_runtime.policy.embeddings import table_of
from ki_runtime.policy.sampler import Sampler

from .bars import Bar, bars_of

Array = npt.NDArray[Any]
Method = Literal["resident", "streamed"]
PASSING = 300_000_000  # bytes of the reference's weights in memory beside others': its layers pass through
RESIDENT = 2_000_000_000  # bytes of float32 weights up to which a model is held whole
COPIES = 3  # of the weights, at most, while a whole model is compared: the model's, the graphs', and room to compute


class ParityPair:
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
        self.bars: Mapping[str, Bar] = bars_of(bundle.manifest.precision, bundle.manifest.budget)
        wanted = graphs.specs(bundle.manifest.config, fast=self.has_fast)
        self._sessions = {spec.name: open_graph(spec) for spec in wanted}
        self.sampler = Sampler(bundle, lambda spec: self._sessions[spec.name])

    def run(self, spec: GraphSpec, *tensors: Tensor) -> dict[str, Array]:
        """One graph on the reference's tensors, given in the contract's order."""
        return self._sessions[spec.name].run(feeds_of(self.bundle, spec, tensors))

    def steps(self, layers: int) -> int | None:
        """Progress steps of a stage in which so many `layers` of the model run; None if it does not tell."""
        return layers if self.method == "streamed" else None


def feeds_of(bundle: Bundle, spec: GraphSpec, tensors: Sequence[Tensor]) -> dict[str, Array]:
    """A graph's inputs by name from the reference's tensors; embeddings of tokens where the graph takes those."""
    table, feeds = table_of(bundle), {}
    for wanted, tensor in zip(spec.inputs, tensors, strict=True):
        if table is not None and wanted.name in graphs.EMBEDDINGS:
            feeds[wanted.name] = table.rows(tensor.numpy())
        else:
            feeds[wanted.name] = np.array(tensor.numpy(), wanted.dtype, order="C")
    return feeds


def open_pair(bundle: Bundle, checkpoint: Checkpoint, method: Method, progress: Progress) -> ParityPair:
    """A bundle and its checkpoint's model, that held whole or read layer by layer."""
    checkpoint = checkpoint.with_rtc(bundle.manifest.config.rtc)
    exact, whole = bundle.manifest.precision in ROUNDED, method == "resident"
    if whole:
        model = load_model(checkpoint, dtype=torch.float32)
    else:
        model = streamed(checkpoint, budget=PASSING if exact else BUDGET, on_layer=progress.step)
    if exact:
        rounding = arithmetic_sessions(bundle, budget=RESIDENT) if whole else arithmetic_sessions(bundle)
        return ParityPair(bundle, model, rounding, method)
    # packed weights are memory that nobody gives back; products of bytes are exact, so int8 gives the same without
    mapped = bundle.manifest.precision == "int8" and not whole
    backend, options = choose_backend("ort"), SessionOptions(prepack=False if mapped else None)
    return ParityPair(bundle, model, lambda spec: open_session(bundle, spec, backend, options), method)


def open_engine(
    bundle: Bundle, checkpoint: Checkpoint, method: Method, progress: Progress, backend: str
) -> tuple[ParityPair, Backend]:
    """The same with a bundle as a backend of the runtime computes it, and which; proven or not.

    FAST decoding is compared where the contract has it: engines of other policies are built without.
    """
    checkpoint = checkpoint.with_rtc(bundle.manifest.config.rtc)
    connection = connect(bundle, backend, SessionOptions(say=progress.say))
    if method == "resident":
        model = load_model(checkpoint, dtype=torch.float32)
    else:
        model = streamed(checkpoint, budget=PASSING, on_layer=progress.step)
    opened = ParityPair(bundle, model, connection.open, method, has_fast=bundle.manifest.decodes_fast)
    return opened, connection.backend


def choose_method(config: Pi05Config, available: int | None = None) -> Method:
    """Whether to hold a model whole. `available`: bytes of free memory, None to ask this machine."""
    size = 4 * sum(math.prod(shape) for shape in parameter_shapes(config).values())
    available = available_memory() if available is None else available
    return "streamed" if size > RESIDENT or (available is not None and COPIES * size > available) else "resident"
