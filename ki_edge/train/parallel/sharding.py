"""How a model is spread over the processes: whole on each (DDP), or in shards by layer (FSDP2).

Sharded, a layer's weights are gathered when it runs and let go afterwards, also in the backward pass. The embedding,
the norms outside of layers and the small projections stay gathered from the forward pass to the end of the backward
one. Vision layers, backbone layers, expert layers are a group each, and so are all modulations together, which run
before the expert's layers do.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ki_edge.errors import ArgumentError
from ki_edge.model import Pi05
from ki_edge.model.layers import Layer

from .processes import Processes

STRATEGIES = ("auto", "ddp", "fsdp2")
ROOM = 0.6  # of a device's memory that weights, gradients, moments and average may take before they are sharded
LEARNING, RESTING = 20, 4  # bytes of a parameter that learns (weight, gradient, two moments, average), and of another
METHODS = (
    "compute_loss",
    "token_loss",
    "fast_logits",
    "sample_actions",
    "sample_fast_tokens",
)  # what is called on a model


def choose(strategy: str, model: nn.Module, processes: Processes) -> str:
    """ "single", "ddp" or "fsdp2". `auto` shards where a whole model with its state would leave too little memory."""
    if strategy not in STRATEGIES:
        raise ArgumentError(f"strategy {strategy}: expected one of {', '.join(STRATEGIES)}")
    if processes.world == 1:
        return "single"
    if strategy != "auto":
        return strategy
    if processes.device.type != "cuda":
        return "ddp"
    room = torch.cuda.get_device_properties(processes.device).total_memory * ROOM
    needed = sum(p.numel() * (LEARNING if p.requires_grad else RESTING) for p in model.parameters())
    return "fsdp2" if needed > room else "ddp"


def shard(model: Pi05, processes: Processes, *, bfloat16: bool) -> None:
    """Let every process hold its rows of each parameter.

    With `bfloat16` layers are gathered in it, norms included, and computed with it; gradients are summed in float32.
    What is outside of layers is gathered in float32, since residuals are.
    """
    # K and V leave a layer as views; nothing changes them in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    rounded = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if bfloat16 else exact
    fully_shard(cast("list[nn.Module]", model.expert.modulations), mesh=mesh, mp_policy=rounded)
    for module in model.modules():
        if isinstance(module, Layer):
            fully_shard(module, mesh=mesh, mp_policy=rounded)
    fully_shard(model, mesh=mesh, mp_policy=exact)
    for method in METHODS:
        register_fsdp_forward_method(model, method)


def replicate(objective: nn.Module) -> DistributedDataParallel:
    """Let gradients of all processes become their mean."""
    return DistributedDataParallel(objective, gradient_as_bucket_view=True)


@contextmanager
def reducing(module: nn.Module, last: bool) -> Iterator[None]:
    """A backward pass after which gradients are those of all processes, if it is a step's `last`.

    Replicas keep their sums to themselves until then. Shards are reduced each time: to keep whole gradients would take
    the memory that sharding saves.
    """
    quiet = isinstance(module, DistributedDataParallel) and not last
    with cast(DistributedDataParallel, module).no_sync() if quiet else nullcontext():
        yield


def release(model: nn.Module) -> None:
    """Let go of gathered weights, after the shards have changed."""
    if isinstance(model, FSDPModule):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def local(value: Tensor) -> Tensor:
    """What this process holds of a parameter: all of it, or its shard. It shares the memory."""
    return value.to_local().detach() if isinstance(value, DTensor) else value.detach()


def whole(value: Tensor) -> Tensor:
    """All of a parameter, gathered from the processes that hold it; all of them must ask."""
    return value.full_tensor().detach() if isinstance(value, DTensor) else value.detach()


def first_row(value: Tensor, processes: Processes) -> int:
    """Which row of the whole parameter the first one of `local` is."""
    if not isinstance(value, DTensor):
        return 0
    rows = value.shape[0]
    return min(processes.rank * -(-rows // processes.world), rows)
