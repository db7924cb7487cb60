"""Export: trace the three graphs, place the weights, describe the bundle, prove it, publish it.

The weights are never loaded to write a bundle, only to prove it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from ki_edge import flow, graphs
from ki_edge.bundle import Bundle, BundleWriter, DecodeVocabulary, Manifest, write_bundle
from ki_edge.errors import ArgumentError
from ki_edge.model import Checkpoint

from .assets import PolicyFiles, decode_vocabulary
from .checker import check
from .provenance import provenance, tool_versions
from .tracing import MIN_OPSET, trace
from .weights import WEIGHTS, Rows, Weights, attach, place_weights, sources
from .wrappers import traceables

TARGETS = ("ort",)
OPSET = 20
NUM_STEPS = 10
Say = Callable[[str], object]


@dataclass(frozen=True)
class ExportOptions:
    """How to export. `num_steps` None: the contract's, or 10."""

    target: str = "ort"
    model_only: bool = False
    num_steps: int | None = None
    opset: int = OPSET
    verify: bool = True
    force: bool = False
    full_vocabulary: bool = False
    pack: bool = False

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ArgumentError(f"target {self.target!r}: expected one of {', '.join(TARGETS)}")
        newest = onnx.defs.onnx_opset_version()
        if not MIN_OPSET <= self.opset <= newest:
            raise ArgumentError(f"opset {self.opset}: expected {MIN_OPSET} to {newest} with onnx {onnx.__version__}")
        if self.num_steps is not None:
            flow.check_steps(self.num_steps)


@dataclass(frozen=True, eq=False)
class Plan:
    """What is known before anything is written: the model, its policy, its traced graphs and their weights' origins."""

    checkpoint: Checkpoint
    files: PolicyFiles | None
    vocabulary: DecodeVocabulary
    models: Mapping[str, ir.Model]
    origins: Mapping[str, Mapping[str, Rows]]

    @property
    def used(self) -> set[str]:
        """Checkpoint keys that graphs or runtime read."""
        rows = (row.key for origin in self.origins.values() for row in origin.values())
        return {*rows, *flow.modulation_weights(self.checkpoint.config.expert.depth)}


def export(checkpoint: str | Path, output: str | Path, options: ExportOptions, say: Say = lambda _: None) -> Bundle:
    """Write a bundle for a checkpoint folder and return it, opened.

    `say` gets a line a stage. CheckpointError, BundleError or ExportError for what is wrong with the input, ParityError
    if the result differs from the model; then nothing is left at `output` but what was there before.
    """
    opened = Checkpoint.open(checkpoint)
    files = None if options.model_only else PolicyFiles.open(opened)
    with write_bundle(output, force=options.force) as writer:
        plan = _plan(opened, files, options, say)
        with _stage(say, "wrote graphs and weights"):
            bundle = _write(writer, plan, options)
        if options.verify:
            from .parity import prove

            prove(writer, bundle, opened, say)
    return Bundle.open(output)


def _plan(checkpoint: Checkpoint, files: PolicyFiles | None, options: ExportOptions, say: Say) -> Plan:
    config = checkpoint.config
    vocabulary = decode_vocabulary(config, files, full=options.full_vocabulary)
    sizes = graphs.sizes(config, len(vocabulary.ids))
    models = {}
    for traceable in traceables(config, vocabulary):
        with _stage(say, f"traced {traceable.spec.name}"):
            models[traceable.spec.name] = trace(traceable, options.opset, sizes)
    origins = {name: sources(model, vocabulary) for name, model in models.items()}
    return Plan(checkpoint, files, vocabulary, models, origins)


def _write(writer: BundleWriter, plan: Plan, options: ExportOptions) -> Bundle:
    weights = place_weights(plan.checkpoint, writer.folder, plan.used, pack=options.pack)
    for name, model in plan.models.items():
        attach(model, plan.origins[name], weights)
        path = writer.folder / f"{name}.onnx"
        ir.save(model, path)
        check(path)
    if plan.files is not None:
        plan.files.copy(writer.folder)
    return writer.seal(_manifest(plan, options, weights))


def _manifest(plan: Plan, options: ExportOptions, weights: Weights) -> Manifest:
    contract = plan.files.contract if plan.files is not None else None
    config, vocabulary = plan.checkpoint.config, plan.vocabulary
    steps = options.num_steps or (contract.num_steps if contract is not None else NUM_STEPS)
    convention = contract.time_convention if contract is not None else plan.checkpoint.time_convention
    return Manifest(
        model=config.to_dict(),
        contract=contract.to_json() if contract is not None else None,
        sampling={"time_convention": convention, "num_steps": steps},
        precision="float32",
        graphs=_signatures(plan),
        weights={
            "file": WEIGHTS,
            "runtime": {key: weights.names[key] for key in flow.modulation_weights(config.expert.depth)},
        },
        decode_vocabulary={"first": vocabulary.first, "count": vocabulary.count, "extra": list(vocabulary.extra)},
        tools={**tool_versions(), "opset": str(options.opset)},
        provenance=provenance(plan.checkpoint, weights.how),
        parity={"verified": False, "reason": "exported with --no-verify"},
    )


def _signatures(plan: Plan) -> dict[str, dict[str, Any]]:
    sizes = graphs.sizes(plan.checkpoint.config, len(plan.vocabulary.ids))

    def describe(tensors: tuple[graphs.TensorSpec, ...]) -> list[dict[str, Any]]:
        return [{"name": t.name, "dtype": t.dtype, "dims": list(t.resolve(sizes))} for t in tensors]

    return {
        spec.name: {"file": f"{spec.name}.onnx", "inputs": describe(spec.inputs), "outputs": describe(spec.outputs)}
        for spec in graphs.GRAPHS
    }


@contextmanager
def _stage(say: Say, what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    say(f"{what} ({time.perf_counter() - start:.1f} s)")
