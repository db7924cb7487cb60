"""Which GPU computes, and under which driver: what a verdict on an engine holds for."""

from __future__ import annotations

import re
from pathlib import Path

from ki_edge.errors import BackendError

from .cuda import DEVICE, Cuda

KERNEL_MODULE = Path("/proc/driver/nvidia/version")


def gpu_environment(cuda: Cuda) -> dict[str, str]:
    """The GPU by name, compute capability and serial identity, and its driver. BackendError if there is none."""
    device = cuda.device()
    return {
        "GPU": f"{device.name} ({device.capability[0]}.{device.capability[1]})",
        "GPU id": _identity(cuda),
        "driver": _driver(cuda),
    }


def _identity(cuda: Cuda) -> str:
    """The GPU's UUID, so that a bundle copied to another robot with its engines is proven there again."""
    uuid = getattr(cuda.call("cudaGetDeviceProperties", DEVICE), "uuid", None)
    content = getattr(uuid, "bytes", uuid)
    return bytes(content).hex() if isinstance(content, bytes | bytearray | list | tuple) else "unknown"


def driver_version(text: str) -> str | None:
    """Of the kernel module, from the file in which it tells it: "... x86_64 Kernel Module  550.54.15  ...", and of the
    open one "... Open Kernel Module for x86_64  580.159.04  ...".
    """
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", text)
    return found[1] if found else None


def _driver(cuda: Cuda) -> str:
    """Version of the kernel module, where it tells (a Jetson before JetPack 7 does not), and the CUDA it serves."""
    try:
        text = KERNEL_MODULE.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = driver_version(text)
    try:
        serves = cuda.driver()
    except BackendError:
        serves = None
    return " ".join(([found] if found else []) + ([f"CUDA {serves}"] if serves else [])) or "unknown"
