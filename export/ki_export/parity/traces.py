"""The actions of one case as a robot would get them, from bundle and reference, for the report's picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.arguments import numbers
from ki_edge.bundle import Bundle
from ki_edge.policy.contract import PolicyContract
from ki_edge.policy.normalize import read_norm_stats, unnormalize
from ki_edge.policy.transforms import OutputPipeline

Array = npt.NDArray[Any]
JOINTS = tuple(f"joint {at}" for at in range(1, 7))
NAMES = {
    "droid": (*JOINTS, "joint 7", "gripper"),
    "libero": ("x", "y", "z", "roll", "pitch", "yaw", "gripper"),
    "aloha": tuple(f"{side} {name}" for side in ("left", "right") for name in (*JOINTS, "gripper")),
}
UNITS = {"aloha": "joints in rad, grippers from 0 to 1"}


@dataclass(frozen=True, eq=False)
class Traces:
    """Actions [H,d]: `ours` of the bundle, `theirs` of the reference; `names` of the d numbers, `unit` in words."""

    ours: Array
    theirs: Array
    names: tuple[str, ...]
    unit: str


def robot_traces(bundle: Bundle, ours: Array, theirs: Array) -> Traces | None:
    """Normalised actions f32 [H,A] through the contract's output pipeline, for a robot in its mean state.

    Without a contract they stay as they are. None if both differ in shape. ContractError if the bundle's statistics do
    not fit its contract.
    """
    if ours.shape != theirs.shape:
        return None
    if bundle.manifest.contract is None:
        names = tuple(f"number {at}" for at in range(theirs.shape[1]))
        return Traces(ours, theirs, names, "normalised: a model alone knows no robot")
    contract = PolicyContract.from_json(bundle.manifest.contract)
    stats = read_norm_stats(bundle.file("assets/norm_stats.json")) if contract.needs_stats else {}
    kind, state = contract.normalization_of("state"), numbers(np.zeros(contract.state_dim), "state")
    if kind != "none":
        state = unnormalize(state, stats["state"], kind, contract.normalization_epsilon)
    pipeline = OutputPipeline(contract, stats)
    names = contract.action_names or NAMES.get(contract.robot, ())
    names = (*names, *(f"number {at}" for at in range(len(names), contract.action_dim)))[: contract.action_dim]
    unit = UNITS.get(contract.robot, "the robot's own units")
    return Traces(pipeline(ours, state), pipeline(theirs, state), names, unit)
