"""All checks in their order, and what each backend makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ki_edge.errors import BackendError
from ki_runtime.gpu.device import check_precision
from ki_runtime.policy.proof import Standing
from ki_runtime.trt.api import Api

from .bundle import Contents, Fit, check_bundle, check_engines, check_room, list_engines
from .finding import Checkup, Finding, Verdict
from .gpu import Gpu, check_gpu
from .host import Host
from .openvino import check_compiled
from .packages import CPU, CUDA, check_cuda_python, check_onnxruntime, check_openvino, check_tensorrt
from .proofs import proofs, standings
from .system import (
    Jetson,
    Memory,
    check_devices,
    check_disk,
    check_jetpack,
    check_memory,
    check_platform,
    check_power,
    check_python,
)

ORT_CPU = ("float32", "float16", "int8")  # precisions of the manifest that it computes
TRT, RTX = ("tensorrt", "tensorrt_lean"), ("tensorrt_rtx",)


@dataclass
class Machine:
    """What is known so far. `bundle` is None without one; `broken`: one was given and cannot be opened."""

    gpu: Gpu | None = None
    jetson: Jetson | None = None
    memory: Memory | None = None
    providers: tuple[str, ...] = ()
    packages: Mapping[str, Api] = field(default_factory=dict)
    cuda_python: bool = False
    openvino: bool = False
    bundle: Contents | None = None
    broken: bool = False
    fits: Mapping[str, Fit] = field(default_factory=dict)


def examine(bundle: Path | None = None, host: Host | None = None) -> Checkup:
    """Look at this machine, and at a bundle folder on it."""
    host, machine = host or Host(), Machine()
    findings = [check_python(host), check_platform(host)]
    machine.jetson, jetpack = check_jetpack(host)
    machine.gpu, gpu = check_gpu(host)
    machine.memory, memory = check_memory(host)
    findings += [jetpack] if jetpack else []
    findings += [check_power(host)] if machine.jetson else []
    findings += [gpu, memory, check_disk(host, bundle or Path.cwd())]
    permissions = check_devices(host, machine.jetson)
    findings += [permissions] if permissions else []
    machine.providers, onnxruntime = check_onnxruntime(host, machine.gpu)
    machine.packages, tensorrt = check_tensorrt(host, machine.gpu, machine.jetson)
    machine.cuda_python, cuda_python = check_cuda_python(host, machine.gpu)
    machine.openvino, openvino = check_openvino(host)
    findings += [*onnxruntime, openvino, *tensorrt, cuda_python]
    if bundle is not None:
        findings += _look_at(host, bundle, machine)
    verdicts = _verdicts(host, machine)
    if machine.bundle is not None:
        opened = machine.bundle.bundle
        findings += check_compiled(opened) if machine.openvino else []
        found = standings(host, opened, [verdict.backend for verdict in verdicts if verdict.runs])
        findings += proofs(opened, found)
        verdicts = tuple(_proven(verdict, found.get(verdict.backend)) for verdict in verdicts)
    return Checkup(tuple(findings), verdicts, _facts(host, machine))


def _look_at(host: Host, folder: Path, machine: Machine) -> list[Finding]:
    machine.bundle, finding = check_bundle(folder)
    if machine.bundle is None:
        machine.broken = True
        return [finding]
    room = check_room(machine.bundle.needs, machine.gpu, machine.memory)
    found = [finding, *([room] if room else []), *list_engines(machine.bundle, machine.packages, machine.gpu)]
    if machine.gpu is None or _gpu_precision(machine) is not None:
        return found
    fits = {}
    for name, api in machine.packages.items():
        fits[name], engines = check_engines(host, machine.bundle, api, machine.gpu, machine.memory)
        found.append(engines)
    machine.fits = fits
    return found


def _verdicts(host: Host, machine: Machine) -> tuple[Verdict, ...]:
    """Of every backend: what was found here, then what the runtime itself says when it is asked."""
    reasons = {
        "trt": _why_not_trt(machine, TRT),
        "trt-rtx": _why_not_trt(machine, RTX),
        "ort-cuda": _why_not_ort_cuda(machine),
        "openvino": None if machine.openvino else "not installed or does not load",
        "ort": _why_not_ort(machine),
    }
    bundle = None if machine.bundle is None else machine.bundle.bundle
    found = []
    for backend, reason in reasons.items():
        why = "the bundle cannot be opened" if machine.broken else reason or host.obstacle(backend, bundle)
        found.append(Verdict(backend, why is None, why or _detail(machine, backend)))
    return tuple(found)


def _proven(verdict: Verdict, standing: Standing | None) -> Verdict:
    """The verdict once it is known what the bundle's witness said there."""
    if standing is None or standing.proven is not False:
        return verdict
    return Verdict(verdict.backend, False, standing.text)


def _detail(machine: Machine, backend: str) -> str:
    """On what it runs, and whether engines come first."""
    if backend in ("openvino", "ort") or machine.gpu is None:
        return "CPU"
    modules = {"trt": TRT, "trt-rtx": RTX}.get(backend, ())
    fits = [machine.fits[name] for name in modules if name in machine.fits]
    later = bool(fits) and not any(fit.ready for fit in fits)
    return machine.gpu.name + (", once its engines are built" if later else "")


def _gpu_precision(machine: Machine) -> str | None:
    """Why no GPU backend here computes in the bundle's precision."""
    if machine.bundle is None or machine.gpu is None:
        return None
    try:
        check_precision(machine.bundle.precision, [machine.gpu.capability])
    except BackendError as error:
        return str(error)
    return None


def _why_not_trt(machine: Machine, modules: tuple[str, ...]) -> str | None:
    if machine.gpu is None:
        return "no GPU"
    usable = [machine.packages[name] for name in modules if name in machine.packages]
    if not usable:
        return f"{modules[0]} is not installed or too old"
    if not machine.cuda_python:
        return "cuda-python is missing or does not fit the driver"
    if modules == RTX and machine.gpu.capability not in usable[0].capabilities:
        return f"{usable[0].title} does not compile for {machine.gpu.sm}"
    fits = [machine.fits[api.name] for api in usable if api.name in machine.fits]
    if fits and not any(fit.ready or fit.buildable for fit in fits):
        return fits[0].reason
    return _gpu_precision(machine)


def _why_not_ort_cuda(machine: Machine) -> str | None:
    if machine.gpu is None:
        return "no GPU"
    if CUDA not in machine.providers:
        return "onnxruntime-gpu is not installed or its CUDA provider does not load"
    return _gpu_precision(machine)


def _why_not_ort(machine: Machine) -> str | None:
    if CPU not in machine.providers:
        return "onnxruntime is not installed or does not load"
    if machine.bundle is not None and machine.bundle.precision not in ORT_CPU:
        return f"it does not compute {machine.bundle.precision} on the CPU"
    return None


def _facts(host: Host, machine: Machine) -> dict[str, Any]:
    """The machine as JSON values."""
    bundle = None
    if machine.bundle is not None:
        need = machine.bundle.needs
        bundle = {
            "path": str(machine.bundle.bundle.path),
            "precision": machine.bundle.precision,
            "acting_bytes": need.acting,
            "with_fast_bytes": need.with_fast,
            "weight_bytes": {name: graph.weight_bytes for name, graph in machine.bundle.graphs.items()},
        }
    return {
        "python": ".".join(map(str, host.python)),
        "machine": host.machine,
        "system": host.system,
        "jetson": None if machine.jetson is None else asdict(machine.jetson),
        "gpu": None if machine.gpu is None else asdict(machine.gpu),
        "memory": None if machine.memory is None else asdict(machine.memory),
        "onnxruntime_providers": list(machine.providers),
        "tensorrt": {name: api.version_text for name, api in machine.packages.items()},
        "bundle": bundle,
    }
