"""Prove a bundle: against its checkpoint's model, or against recorded outputs of another system."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from ki_edge.bundle import Bundle, BundleWriter
from ki_edge.bundle.witness import WITNESS, read_witness
from ki_edge.checkpoints import Checkpoint
from ki_edge.errors import ArgumentError, ParityError
from ki_edge.policy.contract import PolicyContract
from ki_edge.proc import peak_memory
from ki_edge.progress import Progress
from ki_export.arithmetic.session import ROUNDED
from ki_export.weights.differences import differing_weights
from ki_runtime.backends.registry import choose_backend
from ki_runtime.policy.decode import read_tokenizer
from ki_runtime.policy.proof import proving_environment

from .bars import measure
from .cases import Case, compact_cases, engine_cases, standard_cases
from .comparison import RUNTIME, Comparison, compare
from .diagnosis import explain, summary
from .pair import Method, ParityPair, choose_method, open_engine, open_pair
from .report import to_json, write_report
from .witnessing import call_witness, limits

MAX_PROMPT = 200  # tokens, where neither contract nor checkpoint says: π0.5's
CAMERAS = 3
FORCED = (3, 5)  # any two tokens: with them the first decoding step has three queries
CHANGED_WEIGHTS = "changed_weights"
Say = Callable[[str], object]


Then = Callable[[ParityPair, Comparison, Progress], None]


def prove(writer: BundleWriter, bundle: Bundle, checkpoint: Checkpoint, say: Say) -> Bundle:
    """Compare a sealed bundle with its checkpoint, add report, witness and verdict, seal again.

    ParityError if a bar fails.
    """
    start = time.perf_counter()

    def keep_witness(pair: ParityPair, comparison: Comparison, progress: Progress) -> None:
        witness, found = call_witness(pair, comparison, progress)
        comparison.measurements += found
        witness.write(writer.folder / WITNESS)

    comparison = compare_with_checkpoint(bundle, checkpoint, say, then=keep_witness)
    if comparison.explanation is not None:
        raise ParityError(comparison.explanation)
    write_report(writer.folder, comparison, bundle)
    report = to_json(comparison, {})
    verdict = {key: report[key] for key in ("verified", "reference", "method", "cases", "actions", "worst")}
    if bundle.manifest.precision not in ROUNDED:  # those are proven in exact arithmetic, by no engine
        verdict["proven_by"] = proving_environment(choose_backend("ort").setting(bundle, tuple(bundle.manifest.graphs)))
    peak = peak_memory()
    memory = "" if peak is None else f", peak memory {peak / 1e9:.1f} GB"
    say(f"proven equal to {comparison.reference} ({time.perf_counter() - start:.1f} s{memory})")
    sealed = writer.seal(replace(bundle.manifest, parity=verdict))
    read_witness(sealed)  # what a robot would refuse is never published
    return sealed


def compare_with_checkpoint(
    bundle: Bundle,
    checkpoint: Checkpoint,
    say: Say,
    *,
    method: Method | None = None,
    backend: str | None = None,
    then: Then | None = None,
) -> Comparison:
    """Cases of every kind against the PyTorch model; `explanation` tells of the first failure.

    `method`: whether the model is held whole or streamed; None: as its size and the memory demand. `backend`: what
    computes the bundle, proven or not; None: ONNX Runtime on the CPU, and 16-bit bundles exactly in their types.
    `then`: what is done with both sides while they are open, if every bar holds.
    """
    if checkpoint.config != bundle.manifest.config:
        raise ArgumentError(
            f"this bundle was exported from another checkpoint ({bundle.manifest.provenance.get('checkpoint')!s:.60}): "
            f"{checkpoint.path} has another geometry"
        )
    checkpoint = checkpoint.with_pictures(bundle.manifest.config.pictures)
    progress, method = Progress(say), method or choose_method(checkpoint.config)
    if backend is not None:
        return _compare_engine(bundle, checkpoint, method, progress, backend)
    pair = open_pair(bundle, checkpoint, method, progress)
    cases = _prepare(pair, checkpoint)
    comparison = compare(pair, cases, progress)
    comparison.reference = f"the PyTorch model of {checkpoint.path.resolve().name}"
    if CHANGED_WEIGHTS in pair.bars:
        with progress.stage("comparing all weights"):
            changed = len(differing_weights(bundle, checkpoint))
        found = measure("the weights file", RUNTIME, CHANGED_WEIGHTS, changed, 0, bars=pair.bars)
        comparison.measurements.append(found)
    if then is not None and not comparison.failures:
        then(pair, comparison, progress)
    if comparison.failures:
        with progress.stage("looking for the cause"):
            model = pair.model
            del pair  # and with it the graphs' memory
            comparison.explanation = explain(comparison, bundle, checkpoint, model, cases)
    return comparison


def _compare_engine(
    bundle: Bundle, checkpoint: Checkpoint, method: Method, progress: Progress, backend: str
) -> Comparison:
    """The same cases, as far as a backend's engines take them."""
    pair, chosen = open_engine(bundle, checkpoint, method, progress, backend)
    cameras, tokens = limits(bundle.manifest)
    comparison = compare(pair, engine_cases(_prepare(pair, checkpoint), cameras=cameras, max_prompt=tokens), progress)
    comparison.reference = f"the PyTorch model of {checkpoint.path.resolve().name}, on backend {chosen.name}"
    if comparison.failures:
        worst, failed = comparison.worst, len(comparison.failures)
        comparison.explanation = (
            f"{summary(worst)}; {failed} of {len(comparison.measurements)} comparisons failed; backend '{chosen.name}' "
            "computes it differently: its version, its driver, or this precision on this device"
        )
    return comparison


def _prepare(pair: ParityPair, checkpoint: Checkpoint) -> list[Case]:
    """The cases of a bundle; tells the model which ids it may emit."""
    bundle, model = pair.bundle, pair.model
    manifest = bundle.manifest
    contract = None if manifest.contract is None else PolicyContract.from_json(manifest.contract)
    settings = checkpoint.settings
    cameras, forced = CAMERAS, tuple(token for token in FORCED if token < manifest.config.vocab_size)
    prompt = next((settings[k] for k in ("max_token_len", "tokenizer_max_length") if settings.get(k)), MAX_PROMPT)
    if contract is not None:
        tokenizer = read_tokenizer(bundle, contract)
        cameras, prompt, forced = len(contract.cameras), contract.max_token_len, tokenizer.action_ids
        model.eos_id = tokenizer.eos_id
        if contract.fast is not None:
            first = contract.fast.id_offset - contract.fast.size + 1
            fast = range(first, contract.fast.id_offset + 1)
            model.decode_ids = tuple(dict.fromkeys((*fast, *tokenizer.end_ids, tokenizer.eos_id)))
    config, steps = manifest.config, manifest.sampling["num_steps"]
    if pair.method == "streamed":
        return compact_cases(config, cameras=cameras, num_steps=steps, forced=forced)
    return standard_cases(config, cameras=cameras, max_prompt=int(prompt), num_steps=steps, forced=forced)
