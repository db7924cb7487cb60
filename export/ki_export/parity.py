"""Prove a bundle: against its checkpoint's model, or against recorded outputs of another system."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ki_edge.bundle import Bundle, BundleWriter
from ki_edge.contract import PolicyContract
from ki_edge.errors import ArgumentError, ParityError
from ki_edge.model import Checkpoint, Pi05
from ki_edge.prompt import PromptTokenizer

from .cases import Case, standard_cases
from .comparison import Comparison, compare
from .diagnosis import explain
from .provenance import tool_versions
from .report import to_json, write_report

MAX_PROMPT = 200  # tokens, where neither contract nor checkpoint says: π0.5's
CAMERAS = 3
FORCED = (3, 5)  # any two tokens: with them the first decoding step has three queries
TOKENIZER = "assets/tokenizer.model"
Say = Callable[[str], object]


def prove(writer: BundleWriter, bundle: Bundle, checkpoint: Checkpoint, say: Say) -> Bundle:
    """Compare a sealed bundle with its checkpoint, add report and verdict, seal again. ParityError if a bar fails."""
    comparison = compare_with_checkpoint(bundle, checkpoint, say)
    if comparison.explanation is not None:
        raise ParityError(comparison.explanation)
    facts = report_facts(bundle)
    write_report(writer.folder, comparison, facts)
    report = to_json(comparison, {})
    verdict = {key: report[key] for key in ("verified", "reference", "worst")}
    return writer.seal(replace(bundle.manifest, parity=verdict))


def compare_with_checkpoint(bundle: Bundle, checkpoint: Checkpoint, say: Say) -> Comparison:
    """All standard cases against the PyTorch model; `explanation` tells of the first failure."""
    if checkpoint.config != bundle.manifest.config:
        raise ArgumentError(
            f"{checkpoint.path} is not this bundle's checkpoint: its geometry is {checkpoint.config}, "
            f"the bundle's {bundle.manifest.config}"
        )
    model = checkpoint.load_model()
    cases = _prepare(bundle, checkpoint, model)
    comparison = compare(bundle, model, cases, say)
    comparison.reference = f"the PyTorch model of checkpoint {checkpoint.path.resolve().name}"
    if comparison.failures:
        comparison.explanation = explain(comparison, bundle, checkpoint, model, cases)
    return comparison


def report_facts(bundle: Bundle) -> dict[str, Any]:
    """What a report says of the bundle."""
    manifest = bundle.manifest
    return {"provenance": manifest.provenance, "sampling": manifest.sampling, "tools": tool_versions()}


def _prepare(bundle: Bundle, checkpoint: Checkpoint, model: Pi05) -> list[Case]:
    """The cases of a bundle; tells the model which ids it may emit."""
    manifest = bundle.manifest
    contract = None if manifest.contract is None else PolicyContract.from_json(manifest.contract)
    settings = checkpoint.settings
    cameras, forced = CAMERAS, tuple(token for token in FORCED if token < manifest.config.vocab_size)
    prompt = next((settings[k] for k in ("max_token_len", "tokenizer_max_length") if settings.get(k)), MAX_PROMPT)
    if contract is not None:
        tokenizer = PromptTokenizer(bundle.file(TOKENIZER), contract.prompt_format, contract.max_token_len)
        cameras, prompt, forced = len(contract.cameras), contract.max_token_len, tokenizer.action_ids
        model.eos_id = tokenizer.eos_id
        if contract.fast is not None:
            first = contract.fast.id_offset - contract.fast.size + 1
            fast = range(first, contract.fast.id_offset + 1)
            model.decode_ids = tuple(dict.fromkeys((*fast, *tokenizer.end_ids, tokenizer.eos_id)))
    return standard_cases(
        manifest.config,
        cameras=cameras,
        max_prompt=int(prompt),
        num_steps=manifest.sampling["num_steps"],
        forced=forced,
    )
