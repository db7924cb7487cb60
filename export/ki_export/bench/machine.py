"""What a measurement was made on, and what else was running."""

from __future__ import annotations

import math
import os
import platform
import time
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ki_edge.proc import cpu_info

PACKAGES = ("ki-edge", "onnxruntime", "torch", "numpy")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> dict[str, str]:
    """Processor, cores, memory, versions and date."""
    found = {
        "cpu": cpu_info("model name") or cpu_info("Model") or platform.processor() or platform.machine(),
        "cores": str(cores()),
        "memory": _memory(),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return {**found, "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")}


class OtherLoad:
    """How much of the CPU others took while a block ran: `share` of all cores, 0 to 1; NaN where unknown.

    Others are all other processes, and on a virtual machine its neighbours, as far as the kernel is told ("steal").
    """

    def __enter__(self) -> OtherLoad:
        self._start = (time.perf_counter(), time.process_time(), _busy_seconds())
        self.share = math.nan
        return self

    def __exit__(self, *error: object) -> None:
        now = (time.perf_counter(), time.process_time(), _busy_seconds())
        wall, own, busy = (after - before for after, before in zip(now, self._start, strict=True))
        self.share = max(0.0, busy - own) / (wall * (os.cpu_count() or 1))


def _busy_seconds() -> float:
    """CPU seconds that everybody together has used; NaN where the kernel does not tell."""
    path = Path("/proc/stat")
    if not path.is_file():
        return math.nan
    user, nice, system, _idle, _io_wait, irq, soft_irq, steal = map(int, path.read_text("ascii").split()[1:9])
    return (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK")


def _memory() -> str:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{pages / 1e9:.0f} GB"
