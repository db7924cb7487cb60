"""The processes of a run and the device of each, as `accelerate launch`, `torchrun` or a plain start made them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from ki_edge.errors import ArgumentError, BackendError


class Processes:
    """This process among `world`. `main`: the one that writes files and speaks."""

    def __init__(self) -> None:
        state = _start()
        self.rank, self.world = int(state.process_index), int(state.num_processes)
        self.device = torch.device(state.device)
        self.main = self.rank == 0
        self._state = state

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes of a small tensor, in the same place."""
        if self.world > 1:
            distributed.all_reduce(values)
        return values

    def gather(self, rows: Tensor) -> Tensor:
        """Rows [n,...] of all processes, in their order; each has as many."""
        if self.world == 1:
            return rows
        found = [torch.empty_like(rows) for _ in range(self.world)]
        distributed.all_gather(found, rows.contiguous())
        return torch.cat(found)

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            self.sum(torch.zeros(1, device=self.device)).item()

    def wait_for_main(self, what: str) -> None:
        """Until the main process calls this for the same thing, for hours if need be: no device waits for another one,
        whose patience is minutes.
        """
        if self.world == 1:
            return
        store = distributed.distributed_c10d._get_default_store()
        if self.main:
            store.set(f"ki-train {what}", "done")
        else:
            store.wait([f"ki-train {what}"], timedelta(days=7))

    def share(self, value: str) -> str:
        """A text of the main process, in all of them."""
        if self.world == 1:
            return value
        size = torch.zeros(1, dtype=torch.long, device=self.device)
        content = torch.frombuffer(bytearray(value.encode() or b"\0"), dtype=torch.uint8).to(self.device)
        if self.main:
            size += len(content)
        distributed.broadcast(size, 0)
        if not self.main:
            content = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        distributed.broadcast(content, 0)
        return bytes(content.cpu().tolist()).rstrip(b"\0").decode()

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that ends with an error in all processes if it does in one, so that none waits for another."""
        problem: BaseException | None = None
        try:
            yield
        except Exception as error:  # whatever it is, the others must hear of it
            problem = error
        failed = self.sum(torch.tensor([float(problem is not None)], device=self.device)).item()
        if problem is not None:
            raise problem
        if failed:
            raise BackendError("another process of this run failed: its own message says why")

    def close(self) -> None:
        """Leave the group of processes."""
        if self.world > 1 and distributed.is_initialized():
            distributed.destroy_process_group()
            self._state._reset_state()


def _start() -> Any:
    try:
        from accelerate import PartialState
    except ImportError:
        raise ArgumentError("training needs Hugging Face Accelerate: pip install 'ki-edge[train]'") from None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="OMP_NUM_THREADS")  # it chooses a number, which is what one wants
        try:
            return PartialState(cpu=not torch.cuda.is_available())
        except (RuntimeError, ValueError) as error:
            given = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name in os.environ}
            raise BackendError(f"the processes of this run cannot be joined ({given}): {error}") from error


def has_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are fast: a CPU without instructions for them takes 40 times as long."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
