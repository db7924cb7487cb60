"""The GPU, asked of the driver's own library, which needs no package; nvidia-smi where that cannot be loaded."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from ki_runtime.gpu.identity import KERNEL_MODULE, driver_version

from .finding import Finding
from .host import Host

MULTIPROCESSORS, INTEGRATED, MAJOR, MINOR = 16, 18, 75, 76  # of enum CUdevice_attribute
NAME_BYTES = 256
NO_DEVICE = 100
CAUSES = {  # of enum CUresult: what it means, and what helps
    100: ("the driver sees no GPU", "in a container start it with --gpus all (on a Jetson --runtime nvidia)"),
    802: ("the GPU's fabric is not ready", "start nvidia-fabricmanager, or wait a minute after booting"),
    803: ("the driver's library and kernel module differ", "reboot; in a container use a driver as new as the host's"),
    804: ("this GPU does not take a newer CUDA than its driver", "remove cuda-compat, or upgrade the driver"),
    999: ("the driver failed", "look at `dmesg | grep -i nvrm`, reload the module or reboot"),
}
DRIVER_FIX = "install NVIDIA's driver (on a Jetson: sudo apt install nvidia-jetpack), or use the CPU if there is no GPU"


@dataclass(frozen=True)
class Gpu:
    """`memory` in bytes; `shared`: it is the host's (Jetson); `cuda`: the newest version that the driver takes."""

    name: str
    capability: tuple[int, int]
    memory: int | None
    shared: bool
    cuda: tuple[int, int] | None
    driver: str | None
    multiprocessors: int | None = None

    @property
    def sm(self) -> str:
        return f"SM {self.capability[0]}.{self.capability[1]}"


def check_gpu(host: Host) -> tuple[Gpu | None, Finding]:
    """The GPU that CUDA would use first, or None; and what to say about it."""
    hidden = host.environment("CUDA_VISIBLE_DEVICES")
    try:
        library = host.driver()
    except OSError:
        return _without_library(host)
    status = library.cuInit(0)
    count = ctypes.c_int()
    if status == 0:
        library.cuDeviceGetCount(ctypes.byref(count))
    if not count.value:
        text, fix = CAUSES.get(status or NO_DEVICE, (f"the driver reports error {status}", "reboot"))
        if hidden is not None:
            text, fix = f"{text}; CUDA_VISIBLE_DEVICES is '{hidden}'", "unset CUDA_VISIBLE_DEVICES"
        return None, Finding("problem", "GPU", f"none: {text}", fix)
    gpu = _ask(library, driver_version(host.read(str(KERNEL_MODULE)) or ""))
    more = f", the first of {count.value}" if count.value > 1 else ""
    return gpu, Finding("ok", "GPU", describe(gpu) + more)


def describe(gpu: Gpu) -> str:
    """In one line."""
    parts = [gpu.name, gpu.sm]
    if gpu.memory is not None:
        parts.append(f"{gpu.memory / 1e9:.1f} GB" + (" shared with the host" if gpu.shared else ""))
    if gpu.driver is not None:
        parts.append(f"driver {gpu.driver}")
    if gpu.cuda is not None:
        parts.append(f"CUDA {gpu.cuda[0]}.{gpu.cuda[1]}")
    return ", ".join(parts)


def _ask(library: Any, driver: str | None) -> Gpu:
    device, number, size = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(NAME_BYTES)
    library.cuDeviceGet(ctypes.byref(device), 0)
    library.cuDeviceGetName(name, NAME_BYTES, device)
    library.cuDeviceTotalMem_v2(ctypes.byref(size), device)

    def attribute(which: int) -> int:
        library.cuDeviceGetAttribute(ctypes.byref(number), which, device)
        return number.value

    capability, shared = (attribute(MAJOR), attribute(MINOR)), bool(attribute(INTEGRATED))
    multiprocessors = attribute(MULTIPROCESSORS) or None
    library.cuDriverGetVersion(ctypes.byref(number))
    cuda = (number.value // 1000, number.value % 1000 // 10)
    return Gpu(name.value.decode(errors="replace"), capability, size.value, shared, cuda, driver, multiprocessors)


def _without_library(host: Host) -> tuple[None, Finding]:
    """No libcuda.so.1: either no driver, or one that is installed and not found."""
    name = host.run("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    if name:
        first = name.splitlines()[0]
        return None, Finding(
            "problem",
            "GPU",
            f"none: nvidia-smi sees {first}, but libcuda.so.1 is not found",
            "in a container start it with --gpus all and NVIDIA_DRIVER_CAPABILITIES=compute,utility; "
            "else put the driver's folder into /etc/ld.so.conf.d and run sudo ldconfig",
        )
    return None, Finding("warning", "GPU", "none: no NVIDIA driver (libcuda.so.1 is not found)", DRIVER_FIX)
