"""What a policy's statistics and its kind of robot say about limits: a guess with a margin, for want of better ones.

    absolute actions                   position: the actions' range
    actions relative to the state      position: the state's range, of which they are made; step: their own range
    motions (velocities, deltas)       position, which is then the size of the motion: the actions' range

The range is q01 to q99, or three standard deviations about the mean where the quantiles are unknown, and MARGIN of its
width more at both ends. Statistics know nothing of velocities and accelerations.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from ki_edge.policy.contract import PolicyContract
from ki_edge.policy.normalize import NormStats
from ki_edge.policy.transforms import ALOHA_GRIPPERS, aloha_actions_to_robot

from .limits import F64, KINDS, Limits

MARGIN = 0.1  # of the range, at both ends
LEAST_MARGIN = 1e-3  # robot units: a number that never moved in training still rounds
DEVIATIONS = 3.0
LEROBOT_DEVIATIONS = 2.0  # its files may hold the 10 % and 90 % quantiles as q01 and q99
MOTION = re.compile(r"(^|[^a-z])(vel|velocity|delta)([^a-z]|$)", re.IGNORECASE)
GRIPPERS = {"aloha": ALOHA_GRIPPERS, "droid": (7,), "libero": (6,)}


def names_of(contract: PolicyContract) -> tuple[str, ...]:
    """What each number of an action is called; "action 0", "action 1", ... where the contract has no names."""
    names = contract.action_names
    if names is not None and len(set(names)) == len(names):
        return names
    return tuple(f"action {at}" for at in range(contract.action_dim))


def trained_limits(
    contract: PolicyContract, stats: Mapping[str, NormStats], names: tuple[str, ...] | None = None
) -> Limits:
    """Limits from the statistics "state" and "actions" of a policy; none where they say nothing.

    Which dimensions are grippers, and which command motions, comes from the kind of robot, else from the names.
    """
    names = names or names_of(contract)
    size = contract.action_dim
    gripper = [at in GRIPPERS.get(contract.robot, ()) or "gripper" in names[at].lower() for at in range(size)]
    motion = [_moves(contract, at, names[at]) and not gripper[at] for at in range(size)]
    relative = np.zeros(size, np.bool_)
    relative[: len(contract.delta_mask or ())] = contract.delta_mask or ()
    actions, how = _range(stats.get("actions"), size, contract)
    state, how_state = _range(stats.get("state"), size, contract)
    low, high = (np.where(relative, part, own) for part, own in zip(state, actions, strict=True))
    if contract.adapt_to_pi:
        ends = aloha_actions_to_robot(np.stack([low, high]))  # signs swap them
        low, high = ends.min(axis=0), ends.max(axis=0)
    odd = relative & motion  # displacements that were made relative once more: neither range is that of a command
    low, high = np.where(odd, -np.inf, low), np.where(odd, np.inf, high)
    step = np.where(relative & ~odd & ~np.array(gripper), np.maximum(-actions[0], actions[1]), np.inf)
    step = np.where(step >= 0, step, 0.0)
    sources = np.where(relative, f"training states, {how_state}", f"training actions, {how}")
    known = np.isfinite(low)
    return Limits.none(
        names,
        low=low,
        high=high,
        step=step,
        measured=tuple(at if relative[at] and not odd[at] else None for at in range(size)),
        gripper=tuple(gripper),
        motion=tuple(motion),
        origin={
            **dict.fromkeys(KINDS, ("",) * size),
            "position": tuple(str(text) if there else "" for text, there in zip(sources, known, strict=True)),
            "step": tuple(f"training actions, {how}" if there else "" for there in np.isfinite(step)),
        },
    )


def _moves(contract: PolicyContract, at: int, name: str) -> bool:
    """Whether a dimension commands a motion."""
    if contract.robot == "droid":
        mask = contract.delta_mask or ()
        return at < 7 and not (at < len(mask) and mask[at])  # relative to the state are positions alone
    return (contract.robot == "libero" and at < 6) or MOTION.search(name) is not None


def _range(entry: NormStats | None, size: int, contract: PolicyContract) -> tuple[tuple[F64, F64], str]:
    """((low [size], high [size]) with the margin, how they were made); infinite past the statistics."""
    low, high = np.full(size, -np.inf), np.full(size, np.inf)
    text = ""
    if entry is not None and entry.q01 is not None and entry.q99 is not None:
        least, most, text = np.minimum(entry.q01, entry.q99), np.maximum(entry.q01, entry.q99), "q01 to q99"
        if contract.normalization_epsilon == "lerobot" and entry.mean is not None and entry.std is not None:
            spread = LEROBOT_DEVIATIONS * entry.std
            least, most = np.minimum(least, entry.mean - spread), np.maximum(most, entry.mean + spread)
            text = f"lower to upper quantile, mean -+ {LEROBOT_DEVIATIONS:g} std at least"
    elif entry is not None and entry.mean is not None and entry.std is not None:
        least, most = entry.mean - DEVIATIONS * entry.std, entry.mean + DEVIATIONS * entry.std
        text = f"mean -+ {DEVIATIONS:g} std"
    if text and entry is not None:
        d = min(size, entry.dim)
        margin = np.maximum(MARGIN * (most - least), LEAST_MARGIN * np.maximum(1.0, np.abs(most)))[:d]
        low[:d], high[:d] = least[:d] - margin, most[:d] + margin
    return (low, high), f"{text}, and {MARGIN:.0%} of it at both ends"
