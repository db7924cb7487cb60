"""A checkpoint of ki-train, or any with a contract.json beside it: all is recorded."""

from __future__ import annotations

from pathlib import Path

from ki_edge.config import Pi05Config
from ki_edge.errors import ArgumentError, CheckpointError
from ki_edge.policy.contract import PolicyContract

from .records import Record, Settings
from .request import PolicyRequest
from .statistics import MAX_BYTES, NORM_STATS, find_statistics, read_statistics

CONTRACT = "contract.json"


def read_contract(folder: Path) -> PolicyContract | None:
    """The contract beside a checkpoint; None if there is none. CheckpointError, ContractError."""
    path = folder / CONTRACT
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_BYTES:
        raise CheckpointError(f"{path}: {path.stat().st_size} bytes are too many for a contract")
    return PolicyContract.load(path)


def read_native(
    folder: Path, settings: Settings, config: Pi05Config | None, request: PolicyRequest, horizon_from: str | None
) -> Record:
    """The contract of contract.json, the statistics of assets/norm_stats.json."""
    if request.contract is not None:
        raise ArgumentError(f"--contract {request.contract}: {folder} records its own in {CONTRACT}; leave it away")
    contract = read_contract(folder)
    assert contract is not None
    known = dict.fromkeys(contract.to_json(), CONTRACT)
    place = folder / "assets" / NORM_STATS
    found = (
        read_statistics(place, f"assets/{NORM_STATS}")
        if request.assets is None and place.is_file()
        else find_statistics(folder, request.assets)
    )
    if isinstance(found, str):
        missing = (f"no assets/{NORM_STATS}: {found}",) if contract.needs_stats else ()
        return Record(contract, known=known, missing=missing)
    return Record(contract, found, known)
