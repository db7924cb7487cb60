"""A checkpoint's policy as far as it is known: checked that far, and complete or with the list of what it lacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ki_edge.config import Pi05Config
from ki_edge.errors import ArgumentError, CheckpointError, ContractError
from ki_edge.policy.contract import FastContract, PolicyContract
from ki_edge.policy.fast import CODEC_FILE, FastCodec, tokenizer_place
from ki_edge.policy.prompt import PromptTokenizer

from .checks import check_policy
from .codecs import find_codec
from .files import PolicyFiles
from .lerobot import read_lerobot
from .native import CONTRACT, read_native
from .openpi import read_openpi
from .records import Record
from .request import PolicyRequest, missing_horizon, read_given
from .statistics import Statistics
from .tokenizers import TokenizerFile, find_tokenizer, missing_tokenizer

READERS = {"openpi": read_openpi, "openpi-jax": read_openpi, "lerobot": read_lerobot, "ki-train": read_native}
HORIZON = ("action_horizon", "execute")


@dataclass(frozen=True, eq=False)
class PolicyDescription:
    """What is known of a policy.

    `contract` is None while a part of it is missing; `values` are its fields as far as they are known, and `known` says
    where each comes from. `missing`: a sentence each, with the flag that gives it; `files` is the complete policy where
    nothing is missing.
    """

    contract: PolicyContract | None
    values: Mapping[str, Any]
    known: Mapping[str, str]
    statistics: Statistics | None
    tokenizer: TokenizerFile | None
    codec: Path | None
    missing: tuple[str, ...]
    files: PolicyFiles | None = None


def describe_policy(
    folder: Path,
    format: str,
    settings: Mapping[str, Any],
    config: Pi05Config | None,
    request: PolicyRequest,
    *,
    horizon_from: str | None = "config.json",
) -> PolicyDescription:
    """What a checkpoint folder and a request tell of a policy. What is missing is listed, what is wrong is an error.

    `settings` is config.json, `format` a Format of `ki_edge.checkpoints.layout.formats`, `config` the model's geometry
    if it is known, `horizon_from` where its horizon comes from, None if that is no more than a placeholder.
    CheckpointError, ContractError, ArgumentError: the same that an export of the policy would meet.
    """
    if request.lerobot_version is not None and format != "lerobot":
        raise ArgumentError(f"--lerobot-version is for LeRobot's checkpoints; {folder} is {format}: leave it out")
    native = (folder / CONTRACT).is_file()
    record = (read_native if native else READERS[format])(folder, settings, config, request, horizon_from)
    tokenizer = find_tokenizer(folder, request.tokenizer, record.tokenizers)
    missing = list(record.missing)
    horizon_known = horizon_from is not None
    if not horizon_known:
        missing.insert(0, missing_horizon(read_given(request)))
    if tokenizer is None:
        missing.append(missing_tokenizer(record.tokenizers))
    contract, codec = _with_codec(folder, record.contract, request.fast)
    if contract is not None and contract.fast is not None and codec is None:
        place = f"assets/{contract.fast.folder}/{CODEC_FILE}"
        missing.append(f"no {place} (give --fast-codec, the folder of the FAST codec)")
    if contract is not None and request.prompt is not None:
        contract = replace(contract, default_prompt=request.prompt)
    words = _words(folder, tokenizer, contract)
    try:
        check_policy(contract, config, record, words)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    _check_codec(contract, codec)
    values, known = _fields(record, contract, request, horizon_known)
    files = None
    if not missing and contract is not None and words is not None and tokenizer is not None:
        files = PolicyFiles(contract, words, tokenizer, record.statistics, codec, known)
    return PolicyDescription(
        contract if horizon_known else None, values, known, record.statistics, tokenizer, codec, tuple(missing), files
    )


def _words(folder: Path, file: TokenizerFile | None, contract: PolicyContract | None) -> PromptTokenizer | None:
    """The prompt's tokenizer. The file is read whether a contract is known or not: ContractError says what is wrong."""
    if file is None:
        return None
    try:
        if contract is None:
            PromptTokenizer(file.content, "pi05", 1)
            return None
        return PromptTokenizer(file.content, contract.prompt_format, contract.max_token_len)
    except ContractError as error:
        raise ContractError(str(error).replace("the given bytes", f"the tokenizer {file.source}")) from None


def _fields(
    record: Record, contract: PolicyContract | None, request: PolicyRequest, horizon_known: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    """The contract's fields as far as they are known, and where each comes from."""
    values = dict(record.values if contract is None else contract.to_json())
    if not horizon_known:
        values = {name: value for name, value in values.items() if name not in HORIZON}
    flags = {"default_prompt": request.prompt and "--prompt", "fast": request.fast and "--fast-codec"}
    return values, {name: flags.get(name) or record.known.get(name, "not recorded") for name in values}


def _with_codec(
    folder: Path, contract: PolicyContract | None, given: Path | None
) -> tuple[PolicyContract | None, Path | None]:
    """The contract with its FAST head, and the codec's folder if there is one.

    A codec that is given to a contract without FAST has pi0-FAST's place in the vocabulary: nothing else is published.
    """
    place = None if contract is None or contract.fast is None else folder / "assets" / contract.fast.folder
    codec = find_codec(given) if given is not None else place if place and tokenizer_place(place).is_file() else None
    if codec is not None and contract is not None and contract.fast is None:
        return replace(contract, fast=FastContract(size=FastCodec.load(codec).vocab_size)), codec
    return contract, codec


def _check_codec(contract: PolicyContract | None, codec: Path | None) -> None:
    """CheckpointError for a codec with more ids than its place in the vocabulary has."""
    if contract is None or contract.fast is None or codec is None:
        return
    size = FastCodec.load(codec).vocab_size
    if size > contract.fast.size:
        raise CheckpointError(f"the FAST codec in {codec} has {size} FAST ids, the contract has {contract.fast.size}")
