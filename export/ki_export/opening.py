"""From what a user names to an opened checkpoint: a folder, a repository of the Hugging Face Hub, or an adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from ki_edge.checkpoints import Checkpoint
from ki_edge.checkpoints.adapter import is_adapter, resolve_base
from ki_edge.checkpoints.formats import SHARDS, WEIGHTS
from ki_edge.checkpoints.hub import resolve

from .policies import PolicyRequest, given_contract

Say = Callable[[str], object]


@dataclass(frozen=True)
class Where:
    """`name`: folder or ORG/NAME. `revision` of a repository: branch, tag or commit; it is recorded as a commit.

    `base`: folder or ORG/NAME under an adapter, instead of the one that the adapter names. `horizon`: actions of a
    chunk; `default_horizon`: of a checkpoint that does not record it, if `horizon` is None.
    """

    name: str
    revision: str | None = None
    base: str | None = None
    horizon: int | None = None
    default_horizon: int | None = None


def open_checkpoint(where: Where, say: Say = lambda _: None) -> Checkpoint:
    """Fetch if need be, and open. CheckpointError for what does not exist or is no checkpoint."""
    found = resolve(where.name, revision=where.revision, say=say)
    opened = partial(Checkpoint.open, horizon=where.horizon, default_horizon=where.default_horizon)
    alone = is_adapter(found.folder) and not any((found.folder / name).is_file() for name in (WEIGHTS, SHARDS))
    if not alone:
        return opened(found.folder, origin=found.origin)
    base = resolve_base(found.folder, where.base, say=say)
    origin = {**found.origin, **{f"base_{name}": value for name, value in base.origin.items()}}
    return opened(base.folder, adapter=found.folder, origin=origin)


def with_horizon(where: Where, request: PolicyRequest) -> Where:
    """The place, with the given contract's horizon for a checkpoint that does not record its own."""
    contract = given_contract(request)
    return where if contract is None else replace(where, default_horizon=contract.action_horizon)
