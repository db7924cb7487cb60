"""What one checkpoint format records of its policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ki_edge.policy.contract import PolicyContract

from .statistics import Statistics

Settings = Mapping[str, Any]  # a config.json
PALIGEMMA = "google/paligemma-3b-pt-224"


@dataclass(frozen=True)
class Record:
    """The contract, or None with what is `missing` for one; statistics, if they were found.

    `known`: contract field -> the file that records it. `missing`: a sentence each, with the flag that gives it.
    `tokenizers`: where the tokenizer is that the policy was trained with: names of repositories, or a path inside the
    checkpoint; empty if nothing tells.
    """

    contract: PolicyContract | None
    statistics: Statistics | None = None
    known: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    tokenizers: tuple[str, ...] = (PALIGEMMA,)
    values: Mapping[str, Any] = field(default_factory=dict)  # of the `known` fields
    exact_statistics: bool = False  # whether their length must be the contract's (LeRobot), or at least it (openpi)
