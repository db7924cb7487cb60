"""What a server tells of itself when somebody connects: its policy's contract, and what it takes besides openpi's
protocol. openpi's own server tells neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ki_edge.errors import ArgumentError, ContractError
from ki_edge.policy.chunking import Guiding, PreviousChunk, Way
from ki_edge.policy.contract import PolicyContract
from ki_edge.policy.presets import PRESETS, find_preset

OWN = "ki_edge"  # key of the metadata, and of a question
WAYS = ("guided", "trained")


@dataclass(frozen=True)
class Abilities:
    """`contract`: JSON of the policy's, None: it does not tell. `extended`: it takes what is under "ki_edge" in a
    question; `rtc`, `max_delay`: as of `Policy`; `heads`: how it can be asked.
    """

    contract: Any = None
    extended: bool = False
    rtc: Way | None = None
    max_delay: int | None = None
    heads: tuple[str, ...] = ()

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Abilities:
        """Whatever it tells in another form is as good as not told."""
        own = metadata.get(OWN)
        if not isinstance(own, Mapping):
            return cls()
        rtc, most, heads = own.get("rtc"), own.get("max_delay"), own.get("heads")
        extended = isinstance(own.get("request"), list)
        return cls(
            own.get("contract"),
            extended,
            cast(Way, rtc) if extended and rtc in WAYS else None,
            most if extended and type(most) is int else None,
            tuple(map(str, heads)) if extended and isinstance(heads, list) else (),
        )


def rtc_asked(previous: PreviousChunk, way: Way | None, guiding: Guiding | None) -> dict[str, Any]:
    """The previous chunk as it goes into a question."""
    asked: dict[str, Any] = {"actions": previous.actions, "delay": previous.delay, "way": way}
    if guiding is not None:
        asked |= {"maximum": guiding.maximum, "schedule": guiding.schedule, "end": guiding.end}
    return {name: value for name, value in asked.items() if value is not None}


def read_contract(given: str) -> PolicyContract:
    """The contract that `given` names: a JSON file, or the name of one of openpi's training configurations.

    ArgumentError for what is neither; ContractError.
    """
    preset = find_preset(given)
    if preset is not None:
        if preset.horizon is None:
            raise ArgumentError(
                f"--contract {given}: its public configurations differ in their horizon, {preset.horizons}: name one"
            )
        return preset.contract()
    if not Path(given).is_file():
        raise ArgumentError(f"--contract {given:.200}: neither a file nor one of {', '.join(PRESETS)}")
    return PolicyContract.load(given)


def contract_of(uri: str, told: Any, given: PolicyContract | None) -> PolicyContract:
    """The contract that a server tells, or the given one; ContractError for none, and for two different ones."""
    if given is not None:
        if told is not None and PolicyContract.from_json(told) != given:
            raise ContractError(
                f"{uri} tells its policy's contract, and --contract gives another one: leave --contract away, or ask "
                "the server that has the policy it is of"
            )
        return given
    if told is None:
        raise ContractError(
            f"{uri} does not tell its policy's contract, as a server of openpi does not: give --contract FILE, or the "
            "name of openpi's training configuration, such as pi05_droid"
        )
    return PolicyContract.from_json(told)
