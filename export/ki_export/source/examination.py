"""Everything that is checked of a checkpoint before its graphs are traced: what `ki-inspect` tells and an export needs.

Both call `examine`, so they never disagree: what is wrong is the same error, what is missing the same list.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ki_edge.checkpoints import Checkpoint
from ki_edge.checkpoints.layout.geometry import read_horizon
from ki_edge.errors import CheckpointError
from ki_export.policies import PolicyDescription, PolicyFiles, PolicyRequest, describe_policy
from ki_export.policies.native import CONTRACT, read_contract
from ki_export.policies.request import Given, missing_horizon, read_given

from .opening import CheckpointRef, Say, open_checkpoint

PLACEHOLDER = 50  # a horizon to read the geometry of a checkpoint that does not record its own
# flag -> how it is written in the command that gives what is missing
VALUES = {
    "--contract": "NAME",
    "--horizon": "ACTIONS",
    "--norm-stats": "NORM_STATS_JSON",
    "--tokenizer": "TOKENIZER_MODEL",
    "--fast-codec": "FOLDER",
    "--lerobot-version": "VERSION",
}
FLAG = re.compile(r"\(give (--[a-z-]+)|or give (--[a-z-]+)")


class IncompleteError(CheckpointError):
    """Something is missing. `lines`: the same as the message, for people."""

    def __init__(self, found: Examination) -> None:
        alone = "" if found.policy is None else "; or export the model alone with --model-only"
        what = "cannot be exported" if found.policy is None else "is not a complete policy"
        head = f"{found.checkpoint.path} {what}"
        super().__init__(f"{head}: {'; '.join(found.missing)}{alone}. Then: {found.command}")
        self.lines = (f"error: {head}, missing:", *found.missing_lines())


@dataclass(frozen=True, eq=False)
class Examination:
    """`policy` is None for the model alone. `missing`: a sentence each; empty if an export can start."""

    checkpoint: Checkpoint
    policy: PolicyDescription | None
    missing: tuple[str, ...]
    command: str  # that gives what is missing
    horizon_from: str | None  # what tells the horizon; None: the geometry holds a placeholder

    def files(self) -> PolicyFiles | None:
        """The complete policy, None for the model alone. IncompleteError lists everything that is missing."""
        if self.missing:
            raise IncompleteError(self)
        return None if self.policy is None else self.policy.files

    def missing_lines(self) -> tuple[str, ...]:
        """What is missing, a line each, and the command to paste."""
        alone = "" if self.policy is None else " (or add --model-only and give none of it)"
        return (*(f"  - {sentence}" for sentence in self.missing), f"then paste{alone}:", f"  {self.command}")


def examine(
    where: CheckpointRef, request: PolicyRequest, say: Say = lambda _: None, *, model_only: bool = False
) -> Examination:
    """Open a checkpoint and check it with its policy. Only headers, JSON files and assets are read.

    CheckpointError, ContractError or ArgumentError for what is wrong; what is merely missing is listed.
    """
    checkpoint = open_checkpoint(where, say, default_horizon=PLACEHOLDER)
    native = (checkpoint.path / CONTRACT).is_file()  # then --contract names one of its robots
    given = None if model_only or native else read_given(request)
    checkpoint, horizon_from = _with_horizon(checkpoint, where, given)
    if model_only:
        missing = () if horizon_from is not None else (missing_horizon(None),)
        command = _command(where, PolicyRequest(), ("--model-only",), missing)
        return Examination(checkpoint, None, missing, command, horizon_from)
    policy = describe_policy(
        checkpoint.path, checkpoint.format, checkpoint.settings, checkpoint.config, request, horizon_from=horizon_from
    )
    return Examination(checkpoint, policy, policy.missing, _command(where, request, (), policy.missing), horizon_from)


def _with_horizon(checkpoint: Checkpoint, where: CheckpointRef, given: Given | None) -> tuple[Checkpoint, str | None]:
    """The checkpoint with its horizon, and what tells it; None if nothing does."""
    if read_horizon(checkpoint.settings) is not None:
        return checkpoint, "config.json"
    if where.horizon is not None:
        return checkpoint, "--horizon"
    own = read_contract(checkpoint.path)
    if own is not None:
        horizon, source = own.action_horizon, CONTRACT
    elif given is not None and given.horizon is not None:
        horizon, source = given.horizon, f"--contract {given.name}"
    else:
        return checkpoint, None
    return replace(checkpoint, config=replace(checkpoint.config, action_horizon=horizon)), source


def _command(where: CheckpointRef, request: PolicyRequest, extra: Sequence[str], missing: Sequence[str]) -> str:
    """The export with what was given, and a placeholder for everything that is missing."""
    given = {
        "--revision": where.revision,
        "--base": where.base,
        "--horizon": where.horizon,
        "--contract": request.contract,
        "--norm-stats": request.assets,
        "--tokenizer": request.tokenizer,
        "--fast-codec": request.fast,
        "--prompt": request.prompt,
        "--lerobot-version": request.lerobot_version,
    }
    words = ["ki-export", where.name, "-o", "BUNDLE", *extra]
    for flag, value in given.items():
        words += [] if value is None else [flag, str(value)]
    flags = dict.fromkeys(a or b for sentence in missing for a, b in FLAG.findall(sentence))
    asked = [f"{flag} {VALUES.get(flag, 'VALUE')}".strip() for flag in flags if given.get(flag) is None]
    return " ".join([shlex.join(words), *asked])
