"""A checkpoint of ki-train, or any with a contract.json beside it: all is recorded.

One that was trained on several robots has the first one's contract and statistics where all others have theirs, and of
each other robot in robots/NAME/: `--contract NAME` chooses it.
"""

from __future__ import annotations

from pathlib import Path
from unicodedata import normalize

from ki_edge.config import Pi05Config
from ki_edge.errors import ArgumentError, CheckpointError
from ki_edge.policy.contract import PolicyContract

from .records import Record, Settings
from .request import PolicyRequest
from .statistics import MAX_BYTES, NORM_STATS, Statistics, find_statistics, read_statistics

CONTRACT = "contract.json"
ROBOTS = "robots"
MOST_NAMES = 100  # of robots, in a message and to choose from


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
    """The contract of contract.json, the statistics of assets/norm_stats.json; or those of one robot of several."""
    place, stats = folder, f"assets/{NORM_STATS}"
    if request.contract is not None:
        place, stats = _robot(folder, request.contract), NORM_STATS
    contract = read_contract(place)
    assert contract is not None
    known = dict.fromkeys(contract.to_json(), (place / CONTRACT).relative_to(folder).as_posix())
    own = place / stats
    name = own.relative_to(folder).as_posix()
    found: Statistics | str
    if request.assets is None and own.is_file():
        found = read_statistics(own, name)
    elif request.assets is None and place != folder:  # those of the checkpoint are another robot's
        found = f"no {NORM_STATS} beside the robot's contract (give --norm-stats)"
    else:
        found = find_statistics(folder, request.assets)
    if isinstance(found, str):
        missing = (f"no {name}: {found}",) if contract.needs_stats else ()
        return Record(contract, known=known, missing=missing)
    return Record(contract, found, known)


def _robot(folder: Path, given: str) -> Path:
    """The folder of a robot that was trained beside the first one, by its name. ArgumentError for any other name."""
    robots = folder / ROBOTS
    names = sorted(path.parent.name for path in robots.glob(f"*/{CONTRACT}"))[:MOST_NAMES]
    spelt = {normalize("NFC", name): name for name in names}  # a file system or a terminal may spell it otherwise
    if normalize("NFC", given) in spelt:
        return robots / spelt[normalize("NFC", given)]
    others = f"; --contract takes the other robots that it was trained on: {', '.join(names)}" if names else ""
    raise ArgumentError(f"--contract {given}: {folder} records its own in {CONTRACT}; leave it away{others}")
