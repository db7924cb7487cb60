"""What a build will take, told before it starts, and whether the engine has the size that its weights let expect.

Measured with TensorRT-RTX 1.7.1 on two x86 cores, 2026-11-22, 0.1 to 2.7 GB of weights: an engine is its weights and
2 to 4 MB; compiling takes 1.1 to 1.6 times the weights and 0.2 GB, 2.2 times where the engine is not streamed to disk,
besides the weights' own file, which is mapped and which the system may take back; and about 8 seconds a GB. TensorRT's
builder also holds the weights on the GPU while it times kernels, and before 10.13 its parser copies them; its memory
and its time are estimates.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from ki_edge.errors import BackendError
from ki_edge.proc import MEMINFO, sizes, with_swap
from ki_runtime.gpu.device import Device

from .api import Api

GB = 1e9
BASE = 0.25 * GB
STREAMED, WHOLE = 1.6, 2.3  # of the weights, with and without stream writers
ON_GPU, PARSER_COPY, MAPPING_PARSER = 1.0, 1.0, (10, 13)
WARN, REFUSE, OVERHEAD = 1.3, 1.8, 64e6  # engine against its weights; float32 instead of 16 bits doubles it
RTX_SPEED, TRT_SPEED = (2.0, 8.0), (60.0, 120.0)  # seconds for a graph, and for each GB of its weights


def needed(api: Api, weight_bytes: int, *, shared: bool | None = None) -> int:
    """Bytes of host memory that compiling a graph takes at most.

    `shared`: the GPU's memory is the host's, as on Jetson, so what the builder holds there counts; None: not known.
    """
    times = STREAMED if api.streams else WHOLE
    if not api.is_rtx:
        times += (0 if shared is False else ON_GPU) + (PARSER_COPY if api.version < MAPPING_PARSER else 0)
    return int(BASE + times * weight_bytes)


def seconds(api: Api, weight_bytes: int) -> float:
    """A rough estimate of the time that compiling a graph takes."""
    once, each = RTX_SPEED if api.is_rtx else TRT_SPEED
    return once + each * weight_bytes / GB


def estimate(api: Api, sizes: Sequence[int], device: Device | None) -> str:
    """What compiling graphs with these bytes of weights takes, for people."""
    minutes = sum(seconds(api, size) for size in sizes) / 60
    duration = "less than a minute" if minutes < 1 else f"roughly {minutes:.0f} minutes"
    shared = None if device is None else device.shared
    memory = max(needed(api, size, shared=shared) for size in sizes)
    return f"{duration}, up to {memory / GB:.1f} GB of memory, {sum(sizes) / GB:.1f} GB on disk"


def check_memory(api: Api, graph: str, weight_bytes: int, device: Device | None = None) -> None:
    """BackendError if compiling a graph of `weight_bytes` needs more memory than there is, with the estimate.

    `device`: the GPU it is compiled on, if there is one.
    """
    shared, gpu = (None, None) if device is None else (device.shared, device.memory)
    have, need = with_swap(sizes(MEMINFO)), needed(api, weight_bytes, shared=shared)
    if have is not None and have < need:
        raise BackendError(
            f"compiling {graph} ({weight_bytes / GB:.1f} GB of weights) needs about {need / GB:.1f} GB of memory, "
            f"{have / GB:.1f} GB are free: close other programs, add swap, pass --ignore-memory to try all the same, "
            f"or {elsewhere(api)}"
        )
    if gpu is not None and gpu < weight_bytes:
        raise BackendError(
            f"graph {graph} has {weight_bytes / GB:.1f} GB of weights and the GPU {gpu / GB:.1f} GB of memory: "
            "export with --precision fp16, or use a larger GPU"
        )


def elsewhere(api: Api) -> str:
    """Where else engines can be compiled: TensorRT's belong to one GPU, those of TensorRT-RTX to none."""
    if api.is_rtx:
        return "compile on another PC, which needs no GPU (--compute-capability), and copy the bundle with its engines/"
    return (
        "build on a machine with the same GPU (of a Jetson: module, JetPack and power mode) and TensorRT "
        f"{api.version_text}, and copy the bundle with its engines/"
    )


def check_disk(folder: Path, weight_bytes: int) -> None:
    """BackendError if the engines of graphs with `weight_bytes` of weights do not fit on the disk of `folder`."""
    free, need = shutil.disk_usage(folder).free, weight_bytes + OVERHEAD
    if free < need:
        raise BackendError(f"{folder}: {free / GB:.1f} GB are free on this disk, the engines need {need / GB:.1f} GB")


def check_size(graph: str, size: int, weight_bytes: int, precision: str, say: Callable[[str], object]) -> None:
    """Compare an engine with its weights: BackendError if low weights were widened, a line if it is large."""
    times = (size - OVERHEAD) / max(1, weight_bytes)
    found = f"engine {graph} has {size / GB:.2f} GB for {weight_bytes / GB:.2f} GB of weights"
    if times > REFUSE and precision != "float32":
        raise BackendError(f"{found}: TensorRT widened them, so it is neither as fast nor as small as promised")
    if times > WARN:
        say(f"{found}: TensorRT keeps some of them twice")
