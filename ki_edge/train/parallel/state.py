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
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict

from ki_edge.errors import CheckpointError
from ki_edge.files.writing import reason

FILE = 1 << 30  # bytes of whole tensors that share a file: a process copies its part of one at a time
STEP = "step"


def tensors_of(
    parameters: Mapping[str, nn.Parameter], average: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Everything that a run goes on with, but for the step; the tensors themselves."""
    found: dict[str, Tensor] = {f"weights.{name}": value.detach() for name, value in parameters.items()}
    found |= {f"average.{name}": value for name, value in average.items()}
    for name, parameter in parameters.items():
        for part, value in optimizer.state.get(parameter, {}).items():
            if part != STEP and isinstance(value, Tensor):
                found[f"optimizer.{name}.{part}"] = value
    return found


def make_moments(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimiser that has not stepped yet make its moments, all zero; no weight changes."""
    with torch.no_grad():
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0 * group["lr"]  # also where it is a tensor
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)


def save(folder: Path, tensors: Mapping[str, Tensor], step: int) -> None:
    """Write into a folder, with all processes. CheckpointError names it if it cannot be written."""
    state = {**tensors, STEP: torch.tensor([step])}
    files: dict[str, int] = {}
    number, size = 1, 0
    for name, value in state.items():
        size += value.numel() * value.element_size()
        if size > FILE and files:
            number, size = number + 1, value.numel() * value.element_size()
        files[name] = number
    with _named(folder, "written"):
        folder.mkdir(parents=True, exist_ok=True)
        writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
        save_state_dict(state, storage_writer=writer, no_dist=_alone())


def load(folder: Path, tensors: Mapping[str, Tensor]) -> int:
    """Read into these tensors, with all processes; the step. CheckpointError if it is damaged or of another model."""
    state = {**tensors, STEP: torch.zeros(1, dtype=torch.long)}
    if not folder.is_dir() or not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder} holds no training state: resume another checkpoint, or start over")
    with _named(folder, "read"):
        load_state_dict(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=_alone())
    return int(state[STEP])


def _alone() -> bool:
    return not torch.distributed.is_initialized()


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
    return (str(problem) or type(problem).__name__).splitlines()[0][:200]
