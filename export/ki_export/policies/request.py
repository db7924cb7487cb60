"""What a user says about a policy on the command line, and the contract that this gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ki_edge.config import Pi05Config
from ki_edge.errors import ArgumentError, CheckpointError
from ki_edge.policy.contract import PolicyContract
from ki_edge.policy.presets import PRESETS, PUBLIC, SHORT, Preset, find_preset

NAMES = "|".join(SHORT)
LEROBOT_VERSIONS = ("0.4", "0.5")  # what they differ in is in lerobot_version.py
GIVE_CONTRACT = f"give --contract {NAMES}, the name of openpi's training configuration such as pi05_droid, or a FILE"
VARIANTS = {"pi05": "π0.5", "pi0": "π0"}


@dataclass(frozen=True)
class PolicyRequest:
    """What a checkpoint may lack. All None: only what it records and what lies beside it.

    `contract`: name of a preset, or path of a JSON file; `assets`: norm_stats.json or a folder that holds one;
    `tokenizer`: a tokenizer.model or tokenizer.json file, or a folder with one; `fast`: a folder of the FAST codec;
    `prompt`: the default prompt; `lerobot_version`: of LEROBOT_VERSIONS, what a LeRobot policy was trained with; "0.5"
    stands for all newer ones.
    """

    contract: str | None = None
    assets: Path | None = None
    tokenizer: Path | None = None
    fast: Path | None = None
    prompt: str | None = None
    lerobot_version: str | None = None


@dataclass(frozen=True)
class GivenPreset:
    """A contract given by name: what a checkpoint records takes the place of the preset's own value."""

    preset: Preset

    @property
    def name(self) -> str:
        return self.preset.name

    @property
    def horizon(self) -> int | None:
        """Actions of a chunk, if the name tells it."""
        return self.preset.horizon

    def contract(self) -> PolicyContract:
        """The preset's, with a horizon of 1 where it has none."""
        return self.preset.contract(**({} if self.horizon is not None else {"action_horizon": 1}))

    def combine(
        self, recorded: Mapping[str, Any], keys: frozenset[str], known: Mapping[str, str], horizon: int
    ) -> PolicyContract:
        """The contract with the `recorded` fields, `horizon` where neither they nor the preset have one.

        ContractError if they contradict the preset. `keys`, `known`: unused.
        """
        default = {} if self.horizon is not None else {"action_horizon": horizon}
        return self.preset.contract(**{**default, **recorded})

    def check_variant(self, folder: Path, config: Pi05Config) -> None:
        """CheckpointError if the named configuration is of the other kind of model."""
        preset = self.preset
        if preset.variant == config.variant:
            return
        robot = preset.contract(action_horizon=1).robot
        other = next(
            p.name
            for p in PUBLIC.values()
            if p.variant == config.variant and p.contract(action_horizon=1).robot == robot
        )
        raise CheckpointError(
            f"--contract {preset.name} is for a {VARIANTS[preset.variant]}, and {folder} holds a "
            f"{VARIANTS[config.variant]}: give a contract for that, such as --contract {other}"
        )


@dataclass(frozen=True)
class ContractFile:
    """A contract given as a file: what a checkpoint records must agree with it."""

    name: str
    own: PolicyContract

    @property
    def horizon(self) -> int | None:
        """Actions of a chunk."""
        return self.own.action_horizon

    def contract(self) -> PolicyContract:
        """The file's contract."""
        return self.own

    def combine(
        self, recorded: Mapping[str, Any], keys: frozenset[str], known: Mapping[str, str], horizon: int
    ) -> PolicyContract:
        """The file's contract; CheckpointError if one of its `keys` differs from what is `recorded`.

        `known` says where each recorded field comes from; `horizon`: unused.
        """
        values = {**vars(self.own), "action_normalization": self.own.normalization_of("actions")}
        for field in sorted(recorded.keys() & keys):
            given, origin = values[field], known.get(field, "")
            if given != recorded[field]:
                who = f"{origin} says" if origin.startswith("--") else "the checkpoint records"
                raise CheckpointError(
                    f"{self.name}: {field} is {given}, {who} {recorded[field]}: "
                    "correct the file, or take it from the checkpoint it belongs to"
                )
        return self.own


Given = GivenPreset | ContractFile


def read_given(request: PolicyRequest) -> Given | None:
    """The contract that `request.contract` names; None if it names none. ArgumentError, ContractError."""
    if request.contract is None:
        return None
    preset = find_preset(request.contract)
    if preset is not None:
        return GivenPreset(preset)
    path = Path(request.contract)
    if not path.is_file():
        raise ArgumentError(f"--contract {request.contract}: neither a file nor one of {', '.join(PRESETS)}")
    return ContractFile(path.name, PolicyContract.load(path))


def missing_horizon(given: Given | None) -> str:
    """The sentence that asks for it."""
    if isinstance(given, GivenPreset) and given.preset.known:
        which = f"; of openpi's public configurations, {given.name} has {given.preset.horizons}"
        return f"the action horizon is not recorded (give --horizon, the actions of a chunk{which})"
    return "the action horizon is not recorded (give --horizon, the actions of a chunk, or a --contract that has one)"
