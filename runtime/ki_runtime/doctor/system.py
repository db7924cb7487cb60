"""Python, platform, JetPack, power mode, memory, disk, permissions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ki_edge.proc import MEMINFO, parse_sizes, with_swap

from .finding import Finding
from .host import Host

OLDEST, NEWEST = (3, 10), (3, 13)
MACHINES = ("x86_64", "AMD64", "aarch64", "arm64")
RELEASES = {35: ("5", "TensorRT 8.5"), 36: ("6", "TensorRT 10.3"), 38: ("7", "TensorRT 10.13 or newer")}
DEVICES = ("nvidia[0-9]*", "nvidiactl", "nvidia-uvm", "nvmap", "nvhost-gpu", "nvhost-ctrl-gpu", "dri/renderD*")
POWER = re.compile(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>")
LOW_DISK = 2e9


@dataclass(frozen=True)
class Jetson:
    """`model` as the device tree says it, `l4t` such as "36.4.3", `jetpack` such as "6.2" or "6"; "" if unknown."""

    model: str
    l4t: str
    jetpack: str


@dataclass(frozen=True)
class Memory:
    """Of the host, in bytes. `with_swap`: available, and swap that is free."""

    total: int
    available: int
    swap: int
    with_swap: int | None


def check_python(host: Host) -> Finding:
    """One of the versions that the package is for."""
    found = ".".join(map(str, host.python))
    if OLDEST <= host.python[:2] <= NEWEST:
        return Finding("ok", "Python", found + (", virtual environment" if host.in_virtual_environment else ""))
    fix = "python3.12 -m venv ENV, and install again there"
    return Finding("problem", "Python", f"{found}, needed 3.10 to 3.13", fix)


def check_platform(host: Host) -> Finding:
    """x86-64 or 64-bit Arm."""
    text = f"{host.machine}, {host.system}"
    if host.machine in MACHINES:
        return Finding("ok", "platform", text)
    fix = "use a 64-bit x86 or Arm system"
    return Finding("warning", "platform", f"{text}: wheels exist for x86_64 and aarch64", fix)


def check_jetpack(host: Host) -> tuple[Jetson | None, Finding | None]:
    """JetPack's release where this is a Jetson; nothing elsewhere."""
    release = host.read("/etc/nv_tegra_release") or ""
    model = (host.read("/proc/device-tree/model") or "").strip()
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", release)
    if found is None and "Jetson" not in model:
        return None, None
    l4t = f"{found[1]}.{found[2]}" if found else ""
    major = int(found[1]) if found else 0
    known = RELEASES.get(major) or (RELEASES[38] if major > 38 else ("", ""))
    package = host.run("dpkg-query", "-W", "-f=${Version}", "nvidia-jetpack")
    jetson = Jetson(model or "Jetson", l4t, package.split("+")[0] if package else known[0])
    text = f"{jetson.jetpack or 'unknown'} (L4T {l4t or 'unknown'}) on {jetson.model}"
    if major and major < 36:
        fix = "flash JetPack 6.2 or newer: older ones have Python 3.8 and TensorRT 8"
        return jetson, Finding("problem", "JetPack", f"{text}: too old, 6 or newer is needed", fix)
    if package is None and found is not None:
        fix = "sudo apt install nvidia-jetpack (CUDA and TensorRT; in a container they come with its image)"
        return jetson, Finding("warning", "JetPack", f"{text}; the package nvidia-jetpack is not installed", fix)
    return jetson, Finding("ok", "JetPack", text + (f", made for {known[1]}" if known[1] else ""))


def check_power(host: Host) -> Finding:
    """Power mode of a Jetson; the fastest is called MAXN or MAXN_SUPER, and its number differs between boards."""
    modes = {name: number for number, name in POWER.findall(host.read("/etc/nvpmodel.conf") or "")}
    best = max((name for name in modes if name.startswith("MAXN")), key=len, default=None)
    answer = host.run("nvpmodel", "-q") or ""
    found = re.search(r"NV Power Mode:\s*(\S+)", answer)
    fix = f"sudo nvpmodel -m {modes[best] if best else 0} && sudo jetson_clocks"
    if found is None:
        return Finding("warning", "power mode", "unknown: nvpmodel does not answer", f"run `sudo nvpmodel -q`; {fix}")
    mode = found[1]
    if mode == best or (best is None and mode.startswith("MAXN")):
        return Finding("ok", "power mode", f"{mode}; jetson_clocks keeps the clocks up")
    return Finding("warning", "power mode", f"{mode}: slower than {best or 'MAXN'}", fix)


def check_memory(host: Host) -> tuple[Memory | None, Finding]:
    """Of the host. Where the GPU shares it, models and engines' builds live in it."""
    text = host.read(MEMINFO)
    if text is None:
        return None, Finding("warning", "memory", f"unknown: {MEMINFO} cannot be read", "use Linux")
    values = parse_sizes(text)
    total, available, swap_total = (values.get(name, 0) for name in ("MemTotal", "MemAvailable", "SwapTotal"))
    memory = Memory(total, available, swap_total, with_swap(values))
    swap = f"swap {memory.swap / 1e9:.1f} GB" if memory.swap else "no swap"
    return memory, Finding(
        "ok", "memory", f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB available, {swap}"
    )


def check_disk(host: Host, folder: Path) -> Finding:
    """Free space where the bundle lies, or here."""
    free = host.free_bytes(folder)
    text = f"{free / 1e9:.1f} GB free at {folder}"
    if free < LOW_DISK:
        fix = "free some space, or move to another disk"
        return Finding("warning", "disk", f"{text}: too little for a bundle", fix)
    return Finding("ok", "disk", text)


def check_devices(host: Host, jetson: Jetson | None) -> Finding | None:
    """Whether this user may open the GPU's device files; nothing where there are none."""
    files = [path for pattern in DEVICES for path in host.find("/dev", pattern)]
    closed = [path for path in files if not host.usable(path)]
    if not files:
        return None
    if not closed:
        return Finding("ok", "permissions", f"the GPU's device files ({len(files)}) can be opened")
    group = "video,render" if jetson else "render"
    fix = f"sudo usermod -aG {group} $USER, and log in again"
    return Finding("problem", "permissions", f"{', '.join(closed)} cannot be opened by this user", fix)
