"""From what a user names to an opened checkpoint: a folder, a repository of the Hugging Face Hub, or an adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ki_edge.checkpoints import Checkpoint
from ki_edge.checkpoints.layout.formats import SHARDS, WEIGHTS
from ki_edge.checkpoints.peft.adapter import is_adapter, resolve_base
from ki_edge.files.hub import resolve

Say = Callable[[str], object]


@dataclass(frozen=True)
class CheckpointRef:
    """`name`: folder or ORG/NAME. `revision` of a repository: branch, tag or commit; it is recorded as a commit.

    `base`: folder or ORG/NAME under an adapter, instead of the one that the adapter names. `horizon`: actions of a
    chunk, which must be what the checkpoint records if it does.
    """

    name: str
    revision: str | None = None
    base: str | None = None
    horizon: int | None = None


def open_checkpoint(
    where: CheckpointRef, say: Say = lambda _: None, *, default_horizon: int | None = None
) -> Checkpoint:
    """Fetch if need be, and open. CheckpointError for what does not exist or is no checkpoint.

    `default_horizon`: of a checkpoint that does not record it, if `where` has none.
    """
    found = resolve(where.name, revision=where.revision, say=say)
    opened = partial(Checkpoint.open, horizon=where.horizon, default_horizon=default_horizon)
    alone = is_adapter(found.folder) and not any((found.folder / name).is_file() for name in (WEIGHTS, SHARDS))
    if not alone:
        return opened(found.folder, origin=found.origin)
    base = resolve_base(found.folder, where.base, say=say)
    origin = {**found.origin, **{f"base_{name}": value for name, value in base.origin.items()}}
    return opened(base.folder, adapter=found.folder, origin=origin)
