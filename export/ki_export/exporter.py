"""Export: trace the graphs, place the weights, describe the bundle, prove it, publish it.

The weights are never loaded to write a bundle, only to prove it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ki_edge import flow, graphs
from ki_edge.bundle import Bundle, BundleWriter, DecodeVocabulary, Manifest, sha256, write_bundle
from ki_edge.checkpoints import Checkpoint
from ki_edge.checkpoints.layout.keys import EMBEDDING
from ki_edge.dtypes import STORED
from ki_edge.errors import CheckpointError, ExportError
from ki_edge.files.writing import writing
from ki_export.graphs.checker import check
from ki_export.graphs.tracing import quiet, trace_all
from ki_export.passes import CPU_PASSES
from ki_export.passes.attention import fuse_attention
from ki_export.passes.embeddings import take_rows
from ki_export.passes.quantize import quantize
from ki_export.passes.stored import keep_stored_types
from ki_export.precision.low_bits import LowRequest
from ki_export.precision.low_models import lower_further
from ki_export.precision.sixteen_bits import Lowered, Request, lower_models, observations
from ki_export.source.examination import examine
from ki_export.source.opening import CheckpointRef
from ki_export.source.provenance import Hashes, hash_files, provenance, tool_versions
from ki_export.weights.int8 import is_large
from ki_export.weights.weights import WEIGHTS, TensorSlice, Weights, attach, place_weights, sources
from ki_runtime.backends.variant import FIELD as INFERENCE

from .options import ExportOptions
from .policies import PolicyFiles, decode_vocabulary, has_fast_head

NUM_STEPS = 10
Say = Callable[[str], object]


@dataclass(frozen=True, eq=False)
class Plan:
    """What is known before anything is written: the model, its policy, its traced graphs and their weights' origins."""

    checkpoint: Checkpoint
    files: PolicyFiles | None
    vocabulary: DecodeVocabulary
    models: Mapping[str, ir.Model]
    origins: Mapping[str, Mapping[str, TensorSlice]]
    lowered: Lowered | None = None
    ctime_ns: int = 0  # of the checkpoint's first file, before anything of it was read

    @property
    def used(self) -> set[str]:
        """Checkpoint keys that graphs or runtime read."""
        rows = (row.key for origin in self.origins.values() for row in origin.values())
        host = [EMBEDDING] if self.checkpoint.config.embeddings == "host" else []
        return {*rows, *host, *flow.modulation_weights(self.checkpoint.config)}


def export(
    checkpoint: str | Path | CheckpointRef, output: str | Path, options: ExportOptions, say: Say = lambda _: None
) -> Bundle:
    """Write a bundle for a checkpoint and return it, opened.

    `say` gets a line a stage. CheckpointError, BundleError or ExportError for what is wrong with the input, ParityError
    if the result differs from the model; then nothing is left at `output` but what was there before.
    """
    where = checkpoint if isinstance(checkpoint, CheckpointRef) else CheckpointRef(str(checkpoint))
    examined = examine(where, options.policy, say, model_only=options.model_only)
    opened, files = examined.checkpoint, examined.files()
    if files is not None:
        opened = opened.with_pictures(files.contract.pictures)
    opened = opened.with_rtc(options.real_time(None if files is None else files.contract.rtc_max_delay))
    opened = opened.with_embeddings(options.embeddings)
    if options.fast_head is None:  # decided once, for tracing, manifest and contract
        options = replace(options, fast_head=options.full_vocabulary or has_fast_head(opened.config, files))
    if files is not None and not options.fast_head:
        files = replace(files, contract=replace(files.contract, fast=None))
    with write_bundle(output, force=options.force) as writer, ThreadPoolExecutor(1) as hasher:
        ctime_ns = opened.source.files[0].stat().st_ctime_ns
        hashes = hasher.submit(hash_files, opened.source.files)
        plan = replace(_plan(opened, files, options, say), ctime_ns=ctime_ns)
        with _stage(say, "wrote graphs and weights"):
            bundle = _write(writer, plan, options, hashes)
        if options.verify:
            from ki_export.parity.parity import prove

            prove(writer, bundle, opened, say)
        opened.check_unchanged()
    return Bundle.open(output)


def _plan(checkpoint: Checkpoint, files: PolicyFiles | None, options: ExportOptions, say: Say) -> Plan:
    config = checkpoint.config
    vocabulary = decode_vocabulary(config, files, full=options.full_vocabulary, fast_head=bool(options.fast_head))
    # an unfit recording is told before minutes of tracing
    observed = None
    if options.sixteen:
        observed = observations(checkpoint, files, options.calibrate, scales=options.low is not None)
    say(f"tracing {', '.join(spec.name for spec in graphs.specs(config, fast=bool(vocabulary.ids)))}")
    with _stage(say, "traced the graphs"):
        # every pass and audit sees tokens; that the table leaves the graphs comes last
        models = trace_all(replace(config, embeddings="graph"), vocabulary, options.opset, say)
    if options.precision == "int8" and options.low is None:
        with quiet():
            for model in models.values():
                for rewrite in CPU_PASSES:
                    rewrite(model)
                quantize(model, is_large)
    lowered = None
    if observed is not None:
        request = Request(options.base, observed, options.keep_fp32, options.sensitivity and options.low is None)
        lowered = lower_models(checkpoint, models, vocabulary, request, say)
        if options.low is not None:
            low = LowRequest(
                options.low, observed, options.keep, options.budget_cosine, sensitivity=options.sensitivity
            )
            lowered = lower_further(checkpoint, models, vocabulary, lowered, low, say)
    if options.attention == "fused":
        with quiet():
            fused = sum(fuse_attention(model) for model in models.values())
        say(f"fused {fused} attentions: needs TensorRT 10.14 or newer, or TensorRT-RTX")
    if options.embeddings == "host":
        for model in models.values():
            for tokens, rows in graphs.EMBEDDED.items():
                take_rows(model, tokens, rows.name)
    origins = {name: sources(model, vocabulary) for name, model in models.items()}
    if options.weights == "stored":
        tensors = checkpoint.source.tensors
        for name, model in models.items():
            types = {at: STORED[tensors[row.key].dtype] for at, row in origins[name].items() if row.key in tensors}
            keep_stored_types(model, {at: ir.DataType(dtype.onnx) for at, dtype in types.items()})
    return Plan(checkpoint, files, vocabulary, models, origins, lowered)


def _write(writer: BundleWriter, plan: Plan, options: ExportOptions, hashes: Future[Hashes]) -> Bundle:
    forms, low = (None, None) if plan.lowered is None else (plan.lowered.forms, plan.lowered.low)
    weights = place_weights(
        plan.checkpoint,
        writer.folder,
        plan.used,
        stored=options.weights,
        pack=options.pack,
        link=options.link,
        forms=forms,
        low=low,
    )
    for name, model in plan.models.items():
        attach(model, plan.origins[name], weights)
        path = writer.folder / f"{name}.onnx"
        with writing(path, ExportError):
            ir.save(model, path)
        check(path)
    if plan.files is not None:
        plan.files.write(writer.folder)
    if plan.lowered is not None:
        plan.lowered.write(writer.folder)
    read = hashes.result()
    plan.checkpoint.check_unchanged()
    writer.remember(weights.index.path, _weights_hash(weights, plan, read))
    return writer.seal(_manifest(plan, options, weights, read))


def _weights_hash(weights: Weights, plan: Plan, read: Hashes) -> str:
    """Of the weights file. CheckpointError if what was copied is not what was hashed for the provenance.

    Both read the same file, at different times. A write between them sets the time of its last change, which nobody can
    set back; so does a new link to it, so the copy decides then.
    """
    if weights.sha256 is not None:
        return weights.sha256
    file = plan.checkpoint.source.files[0]
    if (
        weights.how != "linked"
        and file.stat().st_ctime_ns != plan.ctime_ns
        and sha256(weights.index.path) != read[file]
    ):
        raise CheckpointError(f"{file} changed while it was read: wait until it is complete and start again")
    return read[file]


def _opsets(plan: Plan) -> str:
    """Of the graphs as written: "20", or "20, 23" where they differ."""
    return ", ".join(map(str, sorted({model.opset_imports[""] for model in plan.models.values()})))


def _manifest(plan: Plan, options: ExportOptions, weights: Weights, hashes: Hashes) -> Manifest:
    contract = plan.files.contract if plan.files is not None else None
    config, vocabulary = plan.checkpoint.config, plan.vocabulary
    steps = options.num_steps or (contract.num_steps if contract is not None else NUM_STEPS)
    convention = contract.time_convention if contract is not None else plan.checkpoint.time_convention
    origin = provenance(plan.checkpoint, hashes, weights.how)
    if plan.lowered is not None and plan.lowered.audit is not None:
        origin["calibration"] = plan.lowered.audit.source
    precision = options.recorded_precision
    asked = {} if options.inference is None else {INFERENCE: options.inference}
    return Manifest(
        model=config.to_dict(),
        contract=contract.to_json() if contract is not None else None,
        sampling={"time_convention": convention, "num_steps": steps, **asked},
        precision=precision,
        graphs=_signatures(plan),
        weights={
            "file": WEIGHTS,
            "types": precision if options.sixteen else options.weights,
            **_exponents(plan),
            **_kinds(plan),
            **({"embeddings": weights.names[EMBEDDING]} if config.embeddings == "host" else {}),
            **({} if options.budget_cosine is None else {"budget_cosine": options.budget_cosine}),
            "runtime": {key: weights.names[key] for key in flow.modulation_weights(config)},
        },
        decode_vocabulary={"first": vocabulary.first, "count": vocabulary.count, "extra": list(vocabulary.extra)},
        tools={**tool_versions(), "opset": _opsets(plan)},
        provenance={**origin, **({} if plan.files is None else {"policy": plan.files.sources})},
        parity={"verified": False, "reason": "exported with --no-verify"},
    )


def _exponents(plan: Plan) -> dict[str, dict[str, int]]:
    """Which weights are stored divided by a power of two."""
    found = {} if plan.lowered is None else {key: form.exponent for key, form in plan.lowered.forms.items()}
    scaled = {key: exponent for key, exponent in found.items() if exponent}
    return {"exponents": scaled} if scaled else {}


def _kinds(plan: Plan) -> dict[str, dict[str, list[str]]]:
    """Which products are in eight or four bits, by their kind."""
    if plan.lowered is None or plan.lowered.plan is None:
        return {}
    found: dict[str, list[str]] = {}
    for site, product in plan.lowered.plan.products.items():
        found.setdefault(product.kind, []).append(site)
    return {"kinds": found}


def _signatures(plan: Plan) -> dict[str, dict[str, Any]]:
    sizes = graphs.sizes(plan.checkpoint.config, len(plan.vocabulary.ids))

    def describe(tensors: tuple[graphs.TensorSpec, ...]) -> list[dict[str, Any]]:
        return [{"name": t.name, "dtype": t.dtype, "dims": list(t.resolve(sizes))} for t in tensors]

    return {
        spec.name: {
            "file": f"{spec.name}.onnx",
            "inputs": describe(spec.inputs),
            "outputs": describe(spec.outputs),
            "opset": plan.models[spec.name].opset_imports[""],
            "ops": sorted({_operator(node) for node in plan.models[spec.name].graph}),
            "weight_bytes": _weight_bytes(plan.models[spec.name]),
        }
        for spec in graphs.specs(plan.checkpoint.config, fast=bool(plan.vocabulary.ids))
    }


def _operator(node: ir.Node) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def _weight_bytes(model: ir.Model) -> int:
    """Of all weights and constants of a graph; of two that lie at one place, once."""
    found: dict[object, int] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None:
            place = (tensor.offset, tensor.length) if isinstance(tensor, ir.ExternalTensor) else name
            found[place] = tensor.nbytes
    return sum(found.values())


@contextmanager
def _stage(say: Say, what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    say(f"{what} ({time.perf_counter() - start:.1f} s)")
