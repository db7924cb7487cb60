"""A checkpoint's policy as far as it is known, and complete or refused with everything that it lacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ki_edge.config import Pi05Config
from ki_edge.contract import FastContract, PolicyContract
from ki_edge.errors import ArgumentError, CheckpointError
from ki_edge.fast import FastCodec
from ki_edge.prompt import PromptTokenizer

from .files import CODEC, CODEC_FILES, MAX_CODEC, PolicyFiles
from .lerobot import read_lerobot
from .native import CONTRACT, read_native
from .openpi import read_openpi
from .request import PolicyRequest
from .statistics import Statistics
from .tokenizers import TokenizerFile, find_tokenizer, missing_tokenizer

READERS = {
    "openpi": read_openpi,
    "openpi-jax": read_openpi,
    "lerobot": read_lerobot,
    "ki-train": read_native,
}


@dataclass(frozen=True, eq=False)
class PolicyFacts:
    """What is known of a policy.

    `contract` is None while a part of it is missing; `values` are its fields as far as they are recorded, and `known`
    says by which file. `missing`: a sentence each, with the flag that gives it; empty for a complete policy.
    """

    contract: PolicyContract | None
    values: Mapping[str, Any]
    known: Mapping[str, str]
    statistics: Statistics | None
    tokenizer: TokenizerFile | None
    codec: Path | None
    missing: tuple[str, ...]
    exact_statistics: bool = False


def describe_policy(
    folder: Path, format: str, settings: Mapping[str, Any], config: Pi05Config | None, request: PolicyRequest
) -> PolicyFacts:
    """What a checkpoint folder and a request tell of a policy. What is missing is no error, what is wrong is one.

    `settings` is config.json, `format` one of `ki_edge.checkpoints.formats.Format`, `config` the model's geometry if it
    is known.
    """
    if request.lerobot_version is not None and format != "lerobot":
        raise ArgumentError(f"--lerobot-version is for LeRobot's checkpoints; {folder} is {format}: leave it out")
    reader = read_native if (folder / CONTRACT).is_file() else READERS[format]
    record = reader(folder, settings, config, request)
    tokenizer = find_tokenizer(folder, request.tokenizer, record.tokenizers)
    missing = list(record.missing)
    if tokenizer is None:
        missing.append(missing_tokenizer(record.tokenizers))
    contract, codec = _with_codec(folder, record.contract, request.fast)
    if contract is not None and contract.fast is not None and codec is None:
        missing.append(f"no assets/{contract.fast.folder}/{CODEC} (give --fast, the folder of the FAST codec)")
    if contract is not None and request.prompt is not None:
        contract = replace(contract, default_prompt=request.prompt)
    values = record.values if contract is None else contract.to_json()
    flags = {"default_prompt": request.prompt and "--prompt", "fast": request.fast and "--fast"}
    known = {name: flags.get(name) or record.known.get(name, _source(request)) for name in values}
    return PolicyFacts(
        contract, values, known, record.statistics, tokenizer, codec, tuple(missing), record.exact_statistics
    )


def read_policy(
    folder: Path, format: str, settings: Mapping[str, Any], config: Pi05Config, request: PolicyRequest
) -> PolicyFiles:
    """The complete policy of a checkpoint whose model is `config`.

    CheckpointError lists everything that is missing, or says what does not fit; ContractError, ArgumentError.
    """
    facts = describe_policy(folder, format, settings, config, request)
    if facts.missing or facts.contract is None or facts.tokenizer is None:
        raise CheckpointError(
            f"{folder} is no complete policy: {'; '.join(facts.missing)}; or export the model alone with --model-only"
        )
    contract = facts.contract
    tokenizer = PromptTokenizer(facts.tokenizer.content, contract.prompt_format, contract.max_token_len)
    files = PolicyFiles(contract, tokenizer, facts.tokenizer, facts.statistics, facts.codec, facts.known)
    try:
        files.check(config, exact=facts.exact_statistics)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    return files


def _with_codec(
    folder: Path, contract: PolicyContract | None, given: Path | None
) -> tuple[PolicyContract | None, Path | None]:
    """The contract with its FAST head, and the codec's folder if there is one.

    A codec that is given to a contract without FAST has pi0-FAST's place in the vocabulary: nothing else is published.
    """
    if contract is None:
        return None, None
    if given is None:
        place = None if contract.fast is None else folder / "assets" / contract.fast.folder
        return contract, place if place is not None and (place / CODEC).is_file() else None
    _check_sizes(given)
    size = FastCodec.load(given).vocab_size
    if contract.fast is None:
        return replace(contract, fast=FastContract(size=size)), given
    if size > contract.fast.size:
        raise CheckpointError(f"--fast {given}: {size} FAST ids, the contract has {contract.fast.size}")
    return contract, given


def _check_sizes(codec: Path) -> None:
    for name in CODEC_FILES:
        if (codec / name).is_file() and (codec / name).stat().st_size > MAX_CODEC:
            raise CheckpointError(f"{codec / name}: too large for a FAST codec (at most {MAX_CODEC} bytes)")


def _source(request: PolicyRequest) -> str:
    if request.contract is None:
        return "default"
    return f"--contract {Path(request.contract).name}"
