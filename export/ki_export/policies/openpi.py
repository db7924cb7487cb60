"""openpi's checkpoints, PyTorch and JAX: they record the model's sizes at most; the rest is in openpi's source code."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from ki_edge.config import Pi05Config
from ki_edge.errors import CheckpointError
from ki_edge.policy.contract import PolicyContract

from .records import Record, Settings
from .request import GIVE_CONTRACT, Given, GivenPreset, PolicyRequest, read_given
from .statistics import find_statistics

# config.json's name -> the contract's
NUMBERS = {"action_horizon": "action_horizon", "action_dim": "model_action_dim", "max_token_len": "max_token_len"}
# what openpi's own code fixes
OF_FORMAT = ("resize", "normalization_epsilon", "time_convention", "pad_state_first", "prompt_state_dim")
NOT_RECORDED = "robot, cameras, prompt format, normalisation, delta mask, state and action dims"


def read_openpi(
    folder: Path, settings: Settings, config: Pi05Config | None, request: PolicyRequest, horizon_from: str | None
) -> Record:
    """What config.json and the tensors tell, put into the contract that was asked for; statistics from assets/."""
    recorded = _recorded(folder, settings)
    known = dict.fromkeys(recorded, "config.json")
    if config is not None:
        size = config.vision.image_size
        sizes: dict[str, Any] = {"model_action_dim": config.action_dim, "image_size": (size, size)}
        known = dict.fromkeys(sizes, "tensors") | known
        recorded = {**recorded, **sizes}
        if horizon_from is not None:
            recorded["action_horizon"] = config.action_horizon
            known["action_horizon"] = horizon_from
    given = read_given(request)
    missing = []
    if given is None:
        missing.append(f"no contract.json, and openpi does not record {NOT_RECORDED} ({GIVE_CONTRACT})")
    if isinstance(given, GivenPreset) and config is not None:
        given.check_variant(folder, config)
    placeholder = 1 if config is None else config.action_horizon
    contract = None if given is None else given.combine(recorded, frozenset(recorded), known, placeholder)
    if given is not None:
        known = _origins(given) | known
    found = find_statistics(folder, request.assets)
    if isinstance(found, str):
        if contract is None or contract.needs_stats:
            missing.append(found)
        return Record(contract, None, known, tuple(missing), values=recorded)
    return Record(contract, found, known, tuple(missing), values=recorded)


def _origins(given: Given) -> dict[str, str]:
    """Where the fields of a given contract come from that the checkpoint does not record."""
    origins = {field.name: f"--contract {given.name}" for field in fields(PolicyContract)}
    if isinstance(given, GivenPreset):
        origins |= {**dict.fromkeys(OF_FORMAT, "openpi"), "execute": "half the horizon"}
    return origins


def _recorded(folder: Path, settings: Settings) -> dict[str, Any]:
    """Contract fields of config.json."""
    recorded: dict[str, Any] = {}
    for name, field in NUMBERS.items():
        value = settings.get(name)
        if value is None:
            continue
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{folder / 'config.json'}: {name} is {value!r}, expected a positive integer")
        recorded[field] = value
    discrete = settings.get("discrete_state_input")
    if isinstance(discrete, bool):
        recorded["prompt_format"] = "pi05" if discrete else "pi0"
    elif discrete is not None:
        raise CheckpointError(f"{folder / 'config.json'}: discrete_state_input is {discrete!r}, expected true or false")
    return recorded
