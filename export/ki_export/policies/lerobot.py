"""LeRobot's checkpoints: config.json and the two processors record the whole policy.

Read after lerobot/policies/pi05/{configuration,processor,modeling}_pi05.py and lerobot/processor/. What LeRobot does
without recording it is asked for: its version, which decides the margin of pictures and the padding of the prompt's
state.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ki_edge.config import Pi05Config
from ki_edge.contract import PolicyContract
from ki_edge.errors import CheckpointError

from .lerobot_config import Notes, read_config
from .lerobot_processors import (
    ACTION,
    INPUT_STEPS,
    MODES,
    NORMALIZER,
    OUTPUT_STEPS,
    POSTPROCESSOR,
    PREPROCESSOR,
    STATE,
    UNNORMALIZER,
    Normalizer,
    Processor,
)
from .lerobot_steps import read_prompt, read_relative
from .lerobot_version import EITHER, read_version
from .records import PALIGEMMA, Record
from .request import GIVE_CONTRACT, ContractFile, PolicyRequest, read_given
from .statistics import Statistics, find_statistics

TYPES = ("pi05", "pi0")
# Fields in which a contract file must agree with the checkpoint; in the others it may differ by choice.
FIXED = frozenset({
    "state_dim", "action_dim", "action_horizon", "model_action_dim", "image_size", "resize", "prompt_format",
    "max_token_len", "normalization", "action_normalization", "normalization_epsilon", "delta_mask", "pad_state_first",
    "time_convention", "adapt_to_pi",
})  # fmt: skip


def read_lerobot(
    folder: Path, settings: Mapping[str, Any], config: Pi05Config | None, request: PolicyRequest
) -> Record:
    """The policy of a LeRobot folder. CheckpointError for another policy's, and for what cannot be reproduced."""
    if settings.get("type") not in TYPES:
        raise CheckpointError(
            f"{folder} holds LeRobot's policy {settings.get('type')!r}: expected {' or '.join(TYPES)}"
        )
    notes = Notes({}, {}, [])
    before = Processor.open(folder, PREPROCESSOR, INPUT_STEPS)
    after = Processor.open(folder, POSTPROCESSOR, OUTPUT_STEPS)
    read_config(folder, settings, before, notes)
    tokenizers: tuple[str, ...] = (PALIGEMMA,)
    if before is None or after is None:
        absent = " and ".join(name for name, at in ((PREPROCESSOR, before), (POSTPROCESSOR, after)) if at is None)
        what = "prompt format, normalisation and relative actions are"
        if request.contract is None:
            notes.missing.append(f"no {absent}, so {what} not recorded ({GIVE_CONTRACT})")
        found = find_statistics(folder, request.assets)
        statistics = found if isinstance(found, Statistics) else None
        if statistics is None:
            notes.missing.append(str(found))
        exact = False
    else:
        tokenizers = read_prompt(before, notes)
        read_relative(before, after, notes)
        statistics, exact = _read_statistics(before, after, request, notes)
    read_version(folder, settings, before, request, notes)
    contract = _contract(request, notes)
    return Record(contract, statistics, notes.known, tuple(notes.missing), tokenizers, notes.values, exact)


def _read_statistics(
    before: Processor, after: Processor, request: PolicyRequest, notes: Notes
) -> tuple[Statistics | None, bool]:
    """Kinds of normalisation and statistics, and whether their length must be the contract's.

    The state's are the preprocessor's, the actions' the postprocessor's: those are what LeRobot applies when it runs.
    """
    sides = {}
    for name, feature, processor, step in (
        ("state", STATE, before, NORMALIZER),
        ("actions", ACTION, after, UNNORMALIZER),
    ):
        if step not in processor.steps:
            raise CheckpointError(f"{processor.where}: no step '{step}', so nothing says how {name} are normalised")
        sides[name] = (feature, Normalizer(processor, processor.steps[step]))
    sides["state"][1].check_images()
    kinds = {name: MODES[side.mode(feature)][0] for name, (feature, side) in sides.items()}
    notes.add(PREPROCESSOR, normalization=kinds["state"])
    notes.add(POSTPROCESSOR, action_normalization=kinds["actions"])
    if request.assets is not None:
        found = find_statistics(before.folder, request.assets)
        if isinstance(found, Statistics):
            return found, False
        notes.missing.append(found)
        return None, False
    features, hashes = {}, []
    for name, (feature, side) in sides.items():
        stats = side.stats(feature)
        if stats is not None:
            features[name] = stats
            hashes.append(side)
        elif kinds[name] != "none":
            mode = side.mode(feature)
            notes.missing.append(
                f"no statistics of '{feature}' for {mode} in the state files of {side.processor.file} (give --assets)"
            )
    if not features:
        return None, True
    files = list(dict.fromkeys(str(side.step.state_file) for side in hashes))
    return Statistics(features, ", ".join(files), ", ".join(dict.fromkeys(side.sha256 for side in hashes))), True


def _contract(request: PolicyRequest, notes: Notes) -> PolicyContract | None:
    given = read_given(request)
    if given is None:
        if any("--contract" in sentence or "--lerobot-version" in sentence for sentence in notes.missing):
            return None
        return PolicyContract(robot="generic", **notes.values)
    _check_cameras(given.contract, given.name, notes)
    values = {name: value for name, value in notes.values.items() if name != "cameras"}
    answered: tuple[str, ...] = ("--contract",)
    if isinstance(given, ContractFile):
        answered += ("--lerobot-version",)
        values = {name: value for name, value in values.items() if notes.known[name] != EITHER}
    notes.missing[:] = [sentence for sentence in notes.missing if not any(flag in sentence for flag in answered)]
    if any("--lerobot-version" in sentence for sentence in notes.missing):
        return None  # a preset's pictures are openpi's
    contract = given.combine(values, FIXED)
    if contract.pictures != "float32":
        raise CheckpointError(
            f"{given.name}: resize is {contract.resize}; LeRobot's is torch_pad (torch_pad_04 up to version 0.4)"
        )
    return contract


def _check_cameras(contract: PolicyContract, name: str, notes: Notes) -> None:
    """A given contract names the cameras as its robot does, but their slots must be the checkpoint's."""
    recorded = notes.values.get("cameras")
    if recorded is None:
        return
    given, own = ([camera.key is not None for camera in cameras] for cameras in (contract.cameras, recorded))
    if given != own:
        slots = ", ".join(f"{camera.slot}{'' if camera.key else ' (empty)'}" for camera in recorded)
        raise CheckpointError(
            f"--contract {name}: its {len(given)} camera slots ({sum(given)} of them used) are not the checkpoint's, "
            f"which are {slots}"
        )
