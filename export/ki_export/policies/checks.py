"""What must fit before a policy is exported: contract, statistics, tokenizer and FAST ids, each other and the model.

Every check runs as soon as what it needs is known, so a policy that lacks a part is checked in the others.
"""

from __future__ import annotations

from ki_edge.config import Pi05Config
from ki_edge.errors import CheckpointError
from ki_edge.policy.contract import Feature, PolicyContract
from ki_edge.policy.prompt import PromptTokenizer

from .records import Record

FIELDS = {"quantile": ("q01", "q99"), "zscore": ("mean", "std"), "none": ()}
FEATURES: tuple[Feature, Feature] = ("state", "actions")


def check_policy(
    contract: PolicyContract | None, config: Pi05Config | None, record: Record, words: PromptTokenizer | None
) -> None:
    """CheckpointError for what does not fit, as far as `contract`, `config`, statistics and `words` are known."""
    if config is not None:
        if contract is not None:
            _check_model(contract, config)
        _check_ids(config.vocab_size, contract, words)
    if contract is not None:
        for feature in FEATURES:
            _check_statistics(feature, contract, record)


def _check_model(contract: PolicyContract, config: Pi05Config) -> None:
    size = config.vision.image_size
    fits = {
        "action_horizon": (contract.action_horizon, config.action_horizon),
        "model_action_dim": (contract.model_action_dim, config.action_dim),
        "image_size": (contract.image_size, (size, size)),
    }
    for name, (given, expected) in fits.items():
        if given != expected:
            raise CheckpointError(f"policy contract: {name} is {given}, the model's is {expected}")
    if config.variant == "pi0" and contract.state_in_prompt:
        raise CheckpointError(
            f"policy contract: prompt format {contract.prompt_format} holds the state, which this π0 model takes "
            "as a token of its own: give a contract for π0, such as --contract pi0_droid"
        )
    if config.has_state and contract.state_dim > config.state_size:
        raise CheckpointError(
            f"policy contract: a state of {contract.state_dim} numbers, but this π0 takes at most {config.state_size}"
        )


def _check_ids(vocabulary: int, contract: PolicyContract | None, words: PromptTokenizer | None) -> None:
    fast = None if contract is None else contract.fast
    ids = {
        "tokenizer": words.vocab_size - 1 if words is not None else 0,
        "fast": fast.id_offset if fast is not None else 0,
    }
    titles = {"tokenizer": "the tokenizer", "fast": "the contract's FAST head"}
    for name, largest in ids.items():
        if largest >= vocabulary:
            raise CheckpointError(f"{titles[name]} has ids up to {largest}, the model's embedding {vocabulary} rows")


def _check_statistics(feature: Feature, contract: PolicyContract, record: Record) -> None:
    """Whether they are there, complete, and as long as the contract's numbers (`exact_statistics`), or longer."""
    kind, statistics = contract.normalization_of(feature), record.statistics
    if kind == "none" or statistics is None:
        return
    dim = contract.state_dim if feature == "state" else contract.action_dim
    entry = statistics.features.get(feature)
    if entry is None:
        if record.exact_statistics:  # a format that has them one by one lists the missing ones itself
            return
        raise CheckpointError(f"{statistics.source}: no statistics of '{feature}', which {kind} normalisation needs")
    absent = [name for name in FIELDS[kind] if getattr(entry, name) is None]
    if absent:
        raise CheckpointError(
            f"{statistics.source}: '{feature}' has no {', '.join(absent)}, which {kind} normalisation needs"
        )
    if entry.dim < dim or (record.exact_statistics and entry.dim != dim):
        raise CheckpointError(
            f"{statistics.source}: statistics whose length does not fit: '{feature}' has {entry.dim} numbers, the "
            f"contract {dim}: are they this robot's? give the right ones with --norm-stats"
        )
