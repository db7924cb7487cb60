"""The training state on disk through torch.distributed.checkpoint: weights, moving average, moments, step.

Every process writes its own part, in safetensors files: nothing in them can be run. Names are the model's, so the state
is read by any number of processes, sharded or not.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict

from ki_edge.errors import CheckpointError
from ki_edge.files.writing import reason

FILE = 1 << 30  # bytes of whole tensors that share a file: a process copies its part of one at a time
STEP = "step"


def save(folder: Path, tensors: Mapping[str, Tensor], step: int) -> None:
    """Write into a folder, with all processes. CheckpointError names it if it cannot be written."""
    state = {**tensors, STEP: torch.tensor([step])}
    with _named(folder, "written"):
        folder.mkdir(parents=True, exist_ok=True)
        writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=_files(state), save_distributed=True)
        save_state_dict(state, storage_writer=writer, no_dist=_alone())


def _files(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Which file each tensor goes into, by number; of all processes, which may have some that others have not."""
    sizes = {name: value.numel() * value.element_size() for name, value in state.items()}
    everybody: list[dict[str, int]] = [sizes]
    if not _alone():
        everybody = everybody * distributed.get_world_size()
        distributed.all_gather_object(everybody, sizes)
    found: dict[str, int] = {}
    number, size = 1, 0
    for name, nbytes in {name: nbytes for sizes in everybody for name, nbytes in sizes.items()}.items():
        if size and size + nbytes > FILE:
            number, size = number + 1, 0
        found[name], size = number, size + nbytes
    return found


def load(folder: Path, tensors: Mapping[str, Tensor]) -> int:
    """Read into these tensors, with all processes; the step. CheckpointError if it is damaged or of another model."""
    state = {**tensors, STEP: torch.zeros(1, dtype=torch.long)}
    if not folder.is_dir() or not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder} holds no training state: resume another checkpoint, or start over")
    with _named(folder, "read"):
        load_state_dict(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=_alone())
    return int(state[STEP])


def _alone() -> bool:
    return not distributed.is_initialized()


@contextmanager
def _named(folder: Path, done: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # so it is in one process
            yield
    except CheckpointException as problem:
        causes = [error for error, _ in problem.failures.values()]
        raise CheckpointError(f"{folder} cannot be {done}: {_say(causes[0] if causes else problem)}") from problem
    except Exception as problem:  # of the library, which has no kind of its own for them
        raise CheckpointError(f"{folder} cannot be {done}: {_say(problem)}") from problem


def _say(problem: BaseException) -> str:
    if isinstance(problem, OSError):
        return reason(problem)
    return (str(problem).strip() or type(problem).__name__).splitlines()[0][:200]
