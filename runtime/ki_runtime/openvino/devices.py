"""The engine and its devices: what is there, what each computes in, and how a graph is compiled for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from threading import RLock
from typing import Any

from ki_edge.errors import BackendError
from ki_runtime.backends.session import first_line
from ki_runtime.backends.variant import Variant

TELEMETRY = "openvino_telemetry"
_LOCK = RLock()
HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
CAPABILITIES = {"float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}


@cache
def openvino() -> Any:
    """The engine; imported when it is first asked for, and without a report to its makers."""
    with unreported():
        return import_module("openvino")


@contextmanager
def unreported() -> Iterator[None]:
    """A block in which importing OpenVINO tells nobody of it.

    Its import brings its converter, which tells a host in the network, and keeps an identifier in ~/intel, through the
    package openvino-telemetry that comes with it. Where that cannot be imported it does neither.
    """
    with _LOCK:
        before = {name: sys.modules[name] for name in (TELEMETRY,) if name in sys.modules}
        sys.modules[TELEMETRY] = None  # type: ignore[assignment]  # importing it is an ImportError now
        try:
            yield
        finally:
            del sys.modules[TELEMETRY]
            sys.modules.update(before)


@dataclass(frozen=True)
class Device:
    """`name` as the engine gives it ("GPU.0"), `title` for people, `roundings` that its products can have."""

    name: str
    title: str
    roundings: tuple[str, ...]


def devices(core: Any) -> list[Device]:
    """Every device that the engine finds here."""
    return [describe(core, name) for name in core.available_devices]


def describe(core: Any, name: str) -> Device:
    """One device, by a name of `available_devices`."""
    can = core.get_property(name, "OPTIMIZATION_CAPABILITIES")
    roundings = tuple(rounding for rounding, word in CAPABILITIES.items() if word in can)
    return Device(name, " ".join(str(core.get_property(name, "FULL_DEVICE_NAME")).split())[:200], roundings)


def find(core: Any, variant: Variant) -> Device:
    """The device of a variant. BackendError that lists what is there, or what it computes in."""
    there = [str(name) for name in core.available_devices]
    wanted = variant.device
    name = next((name for name in there if name == wanted or name.split(".")[0] == wanted), None)
    if name is None:
        raise BackendError(f"OpenVINO {version()} finds no {wanted} here, only {', '.join(there) or 'nothing'}")
    device = describe(core, name)
    if variant.rounding not in device.roundings:
        instead = ", ".join(device.roundings) or "none of these"
        cure = "; openvino:CPU:f32 computes the bundle in float32" if variant.rounding != "float32" else ""
        raise BackendError(f"{device.title} ({name}) has no {variant.rounding} arithmetic, only {instead}{cure}")
    return device


def version() -> str:
    """Of the engine, with its build."""
    return str(openvino().__version__)


def settings(variant: Variant, threads: int | None) -> Mapping[str, Any]:
    """How a graph is compiled: this rounding and no other, one inference at a time, threads where the system puts them.

    Without the hint the engine takes bfloat16 in silence on every CPU that has it. Pinned threads would share a core
    with a robot's other processes while others idle. Numbers below 1e-38 count as zero: else the engine reads all
    weights when it starts, to look for them.
    """
    found: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": HINTS[variant.rounding],
        "PERFORMANCE_HINT": "LATENCY",
        "CACHE_MODE": "OPTIMIZE_SIZE",
    }
    if variant.device == "CPU":
        found |= {
            "INFERENCE_NUM_THREADS": threads or 0,
            "ENABLE_CPU_PINNING": False,
            "CPU_DENORMALS_OPTIMIZATION": True,
        }
    return found


def check_rounding(compiled: Any, variant: Variant, graph: str) -> None:
    """BackendError if a compiled graph computes in another type than was asked for."""
    taken = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if taken != HINTS[variant.rounding]:
        raise BackendError(f"OpenVINO computes {graph} in {taken} where {variant.rounding} was asked for")


def failure(what: str, error: BaseException) -> BackendError:
    """An error of the engine's, whose first lines tell only where in its sources it was raised."""
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [line for line in lines if line and "Exception from" not in line]
    return BackendError(f"OpenVINO {what}: {telling[0][:300] if telling else first_line(error)}")
