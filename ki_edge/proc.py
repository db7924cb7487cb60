"""What Linux says of this machine and this process in /proc: memory and processor. Elsewhere nothing is known."""

from __future__ import annotations

import re
from pathlib import Path

MEMINFO, STATUS, CPUINFO = "/proc/meminfo", "/proc/self/status", "/proc/cpuinfo"


def parse_sizes(text: str) -> dict[str, int]:
    """Bytes by name, of lines such as "MemAvailable:  123 kB"."""
    found = re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)
    return {name: 1024 * int(size) for name, size in found}


def sizes(path: str) -> dict[str, int]:
    """Those of a file; none where the system has no such file."""
    return parse_sizes(_read(path))


def peak_memory() -> int | None:
    """Bytes of memory that this process has had at most, mapped files included; None where the system does not say."""
    return sizes(STATUS).get("VmHWM")


def available_memory() -> int | None:
    """Bytes of memory that programs may still take; None where the system does not say."""
    return sizes(MEMINFO).get("MemAvailable")


def with_swap(meminfo: dict[str, int]) -> int | None:
    """The same and the swap that is free: enough for what runs once and may be slow, such as building engines."""
    known = meminfo.keys() & {"MemAvailable", "SwapFree"}
    return sum(meminfo[name] for name in known) if known else None


def cpu_info(name: str) -> str:
    """A line's value of the description of the first processor that has it; empty without one."""
    lines = _read(CPUINFO).splitlines()
    found = next((line for line in lines if line.split(":")[0].strip() == name), "")
    return found.partition(":")[2].strip()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
