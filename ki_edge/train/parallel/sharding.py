"""How a model is spread over the processes: whole on each (DDP), or in shards by layer (FSDP2)."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(value: Tensor) -> Tensor:
    """What this process holds of a parameter: all of it, or its shard. It shares the memory."""
    return value.to_local().detach() if isinstance(value, DTensor) else value.detach()


def whole(value: Tensor) -> Tensor:
    """All of a parameter, gathered from the processes that hold it; all of them must ask."""
    return value.full_tensor().detach() if isinstance(value, DTensor) else value.detach()
