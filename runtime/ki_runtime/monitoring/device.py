"""How much memory the accelerator has left, where this process uses one."""

from __future__ import annotations

import sys

NVIDIA = "ki_runtime.gpu.cuda"  # imported by every backend that computes on an NVIDIA GPU, and by nothing else


def device_memory() -> tuple[int, int] | None:
    """(free, all) bytes of the first device; None where nothing in this process uses one. BackendError if it is lost.

    Asking must not open a device: a server on CPUs would take some hundred MB of a GPU that others use.
    """
    module = sys.modules.get(NVIDIA)
    cuda = None if module is None else module.Cuda.in_use()
    return None if cuda is None else cuda.memory()
