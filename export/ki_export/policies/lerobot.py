"""LeRobot's checkpoints: config.json and the two processors record the whole policy.

Read after lerobot/policies/pi05/{configuration,processor,modeling}_pi05.py and lerobot/processor/. What LeRobot does
without recording it is asked for: its version, which decides the margin of pictures and the padding of the prompt's
state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ki_edge.checkpoints.layout.formats import WEIGHTS
from ki_edge.config import Pi05Config
from ki_edge.errors import CheckpointError
from ki_edge.policy.contract import PolicyContract

from .lerobot_buffers import read_buffers, read_old_statistics
from .lerobot_config import CONFIG, Notes, read_config
from .lerobot_options import NORMALIZER, UNNORMALIZER
from .lerobot_processors import (
    ACTION,
    INPUT_STEPS,
    MODES,
    OUTPUT_STEPS,
    POSTPROCESSOR,
    PREPROCESSOR,
    STATE,
    Normalizer,
    Processor,
)
from .lerobot_steps import read_prompt, read_relative
from .lerobot_version import ADDED_TIMES, EITHER, read_version
from .records import PALIGEMMA, Record, Settings
from .request import GIVE_CONTRACT, ContractFile, PolicyRequest, read_given
from .statistics import Statistics, find_statistics

TYPES = ("pi05", "pi0")
NUM_STEPS = 10  # denoising steps of every release
# Fields in which a contract file must agree with the checkpoint; in the others it may differ by choice.
FIXED = frozenset({
    "state_dim", "action_dim", "action_horizon", "model_action_dim", "image_size", "resize", "prompt_format",
    "max_token_len", "normalization", "action_normalization", "normalization_epsilon", "delta_mask", "pad_state_first",
    "prompt_state_dim", "time_convention", "adapt_to_pi",
})  # fmt: skip


def read_lerobot(
    folder: Path, settings: Settings, config: Pi05Config | None, request: PolicyRequest, horizon_from: str | None
) -> Record:
    """The policy of a LeRobot folder. CheckpointError for another policy's, and for what cannot be reproduced."""
    if settings.get("type") not in TYPES:
        raise CheckpointError(
            f"{folder} holds LeRobot's policy {settings.get('type')!r:.60}: expected {' or '.join(TYPES)}"
        )
    notes = Notes({}, {}, [])
    before = Processor.open(folder, PREPROCESSOR, INPUT_STEPS)
    after = Processor.open(folder, POSTPROCESSOR, OUTPUT_STEPS)
    read_config(folder, settings, before, notes)
    if config is not None:
        _read_sizes(folder, settings, config, horizon_from, notes)
    tokenizers: tuple[str, ...] = (PALIGEMMA,)
    if before is None or after is None:
        absent = " and ".join(name for name, at in ((PREPROCESSOR, before), (POSTPROCESSOR, after)) if at is None)
        statistics, exact = _without_processors(folder, settings, request, notes, absent), False
    else:
        tokenizers = read_prompt(before, notes)
        statistics, exact = _read_statistics(before, after, request, notes)
        read_relative(before, after, notes)
    read_version(folder, settings, before, request, notes)
    contract = _contract(folder, config, request, notes)
    return Record(contract, statistics, notes.known, tuple(notes.missing), tokenizers, notes.values, exact)


def _read_sizes(folder: Path, settings: Settings, config: Pi05Config, horizon_from: str | None, notes: Notes) -> None:
    """What the tensors and the command line tell where config.json does not; a state width that they contradict."""
    padded = settings.get("max_state_dim", config.state_size)
    if config.has_state and padded != config.state_size:
        raise CheckpointError(
            f"{folder / CONFIG}: max_state_dim is {padded}, the model's state_proj takes {config.state_size} numbers"
        )
    size = config.vision.image_size
    for name, value in (("model_action_dim", config.action_dim), ("image_size", (size, size))):
        if name not in notes.values:
            notes.add("tensors", **{name: value})
    if horizon_from is not None and "action_horizon" not in notes.values:
        notes.add(horizon_from, action_horizon=config.action_horizon)


def _without_processors(
    folder: Path, settings: Settings, request: PolicyRequest, notes: Notes, absent: str
) -> Statistics | None:
    """Statistics of a folder that LeRobot wrote before 0.4, or that somebody copied in part."""
    buffers = read_buffers(folder)
    what = "prompt format, normalisation and relative actions are"
    if buffers:
        what = "prompt format and relative actions are"
        absent += f" (a checkpoint of LeRobot before 0.4, whose normalisation lies in {WEIGHTS})"
    if request.contract is None:
        notes.missing.append(f"no {absent}, so {what} not recorded ({GIVE_CONTRACT})")
    if buffers:
        statistics = read_old_statistics(folder, settings, buffers, request.assets is None, notes)
        if request.assets is None:
            return statistics
    found = find_statistics(folder, request.assets)
    if isinstance(found, Statistics):
        return found
    notes.missing.append(found)
    return None


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
    _read_lengths(sides, notes)
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
                f"no statistics of '{feature}' for {mode} in the state files of {side.processor.file} "
                "(give --norm-stats)"
            )
    if not features:
        return None, True
    files = list(dict.fromkeys(str(side.step.state_file) for side in hashes))
    return Statistics(features, ", ".join(files), ", ".join(dict.fromkeys(side.sha256 for side in hashes))), True


def _read_lengths(sides: Mapping[str, tuple[str, Normalizer]], notes: Notes) -> None:
    """The robot's dims where config.json still has those of the model that was trained further.

    `lerobot-train --policy.path=lerobot/pi05_base` keeps the base's state of 32 numbers; statistics are the robot's.
    """
    for name, field in (("state", "state_dim"), ("actions", "action_dim")):
        feature, side = sides[name]
        length = side.length(feature)
        if length is not None and length < notes.values.get(field, 0):
            notes.add(f"statistics in {side.step.state_file}; {CONFIG} has {notes.values[field]}", **{field: length})


def _contract(folder: Path, config: Pi05Config | None, request: PolicyRequest, notes: Notes) -> PolicyContract | None:
    """The contract of all that was read, with a placeholder for a horizon that nothing tells."""
    given, horizon = read_given(request), 1 if config is None else config.action_horizon
    notes.known.setdefault("robot", "LeRobot")
    if given is None:
        if any("--contract" in sentence or "--lerobot-version" in sentence for sentence in notes.missing):
            return None
        defaults = {"action_horizon": horizon, "execute": _execute(notes, horizon), **_defaults(notes)}
        return PolicyContract(robot="generic", **{**defaults, **notes.values})
    _check_cameras(given.contract(), given.name, notes)
    values = {name: value for name, value in notes.values.items() if name != "cameras"}
    answered: tuple[str, ...] = ("--contract",)
    if isinstance(given, ContractFile):
        answered += ("--lerobot-version",)
        values = {name: value for name, value in values.items() if notes.known[name] not in (EITHER, ADDED_TIMES)}
    notes.missing[:] = [sentence for sentence in notes.missing if not any(flag in sentence for flag in answered)]
    if any("--lerobot-version" in sentence for sentence in notes.missing):
        return None  # a preset's pictures are openpi's
    contract = given.combine(values, FIXED, notes.known, horizon)
    if contract.pictures != "float32":
        raise CheckpointError(
            f"{given.name}: resize is {contract.resize}; LeRobot's is torch_pad (torch_pad_04 up to version 0.4)"
        )
    for field in fields(PolicyContract):
        if field.name not in values:
            notes.known[field.name] = f"--contract {given.name}"
    return contract


def _execute(notes: Notes, horizon: int) -> int:
    """Actions to execute before the next inference, where config.json does not say: a choice of whoever runs it."""
    notes.known.setdefault("execute", "half the horizon")
    return max(1, int(notes.values.get("action_horizon", horizon)) // 2)


def _defaults(notes: Notes) -> dict[str, Any]:
    """What LeRobot takes where its config.json, of an older release, does not have a key."""
    notes.known.setdefault("num_steps", "LeRobot's default")
    return {"num_steps": NUM_STEPS}


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
