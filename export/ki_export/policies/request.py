"""What a user says about a policy on the command line, and the contract that this gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ki_edge.contract import PRESETS, PolicyContract
from ki_edge.errors import ArgumentError, CheckpointError

NAMES = "|".join(PRESETS)
LEROBOT_VERSIONS = ("0.4", "0.5")  # what they differ in is in lerobot_version.py
GIVE_CONTRACT = f"give --contract {NAMES} or a FILE"


@dataclass(frozen=True)
class PolicyRequest:
    """What a checkpoint may lack. All None: only what it records and what lies beside it.

    `contract`: name of a preset, or path of a JSON file; `assets`: norm_stats.json or a folder that holds one;
    `tokenizer`: a tokenizer.model file; `fast`: a folder of the FAST codec; `prompt`: the default prompt;
    `lerobot_version`: of LEROBOT_VERSIONS, what a LeRobot policy was trained with; "0.5" stands for all newer ones.
    """

    contract: str | None = None
    assets: Path | None = None
    tokenizer: Path | None = None
    fast: Path | None = None
    prompt: str | None = None
    lerobot_version: str | None = None


@dataclass(frozen=True)
class Preset:
    """A contract given by name: what a checkpoint records takes the place of the preset's own value."""

    name: str
    make: Callable[..., PolicyContract]

    @property
    def contract(self) -> PolicyContract:
        return self.make()

    def combine(self, recorded: Mapping[str, Any], keys: frozenset[str]) -> PolicyContract:
        """The contract with the `recorded` fields; ContractError if they contradict the preset. `keys`: unused."""
        return self.make(**recorded)


@dataclass(frozen=True)
class ContractFile:
    """A contract given as a file: what a checkpoint records must agree with it."""

    name: str
    contract: PolicyContract

    def combine(self, recorded: Mapping[str, Any], keys: frozenset[str]) -> PolicyContract:
        """The file's contract; CheckpointError if one of its `keys` differs from what is `recorded`."""
        values = {**vars(self.contract), "action_normalization": self.contract.normalization_of("actions")}
        for field in sorted(recorded.keys() & keys):
            given = values[field]
            if given != recorded[field]:
                raise CheckpointError(
                    f"{self.name}: {field} is {given}, the checkpoint records {recorded[field]}: "
                    "correct the file, or take it from the checkpoint it belongs to"
                )
        return self.contract


Given = Preset | ContractFile


def read_given(request: PolicyRequest) -> Given | None:
    """The contract that `request.contract` names; None if it names none. ArgumentError, ContractError."""
    if request.contract is None:
        return None
    if request.contract in PRESETS:
        return Preset(request.contract, PRESETS[request.contract])
    path = Path(request.contract)
    if not path.is_file():
        raise ArgumentError(f"--contract {request.contract}: neither a file nor one of {', '.join(PRESETS)}")
    return ContractFile(path.name, PolicyContract.load(path))


def given_contract(request: PolicyRequest) -> PolicyContract | None:
    """The contract of `request.contract` before a checkpoint is known: it tells the horizon where no file does."""
    given = read_given(request)
    return None if given is None else given.contract
