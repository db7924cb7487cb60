"""What engines are compiled for: this machine's GPU, or GPUs that need not be here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module

from ki_edge.errors import BackendError
from ki_runtime.gpu.device import Capability, Device, check_precision, describe_capabilities, parse_capabilities

from .api import Api

MODULES = {"trt": "tensorrt", "trt-rtx": "tensorrt_rtx"}  # target -> module
OF_GEFORCE = re.compile(r"rtx|geforce|[345]0[6-9]0")
OF_CPUS = re.compile(r"cpu|onnx|ort|x86|intel|amd|arm|raspberry")
OF_BOARDS = re.compile(r"jetson|orin|thor|agx|nano|[abh][1-3]00|nvidia|tensorrt|gpu|cuda")


def meant(target: str) -> str:
    """What somebody means who names a device instead of a target, as the end of a message; "" if nobody can tell."""
    name = target.lower()
    if OF_GEFORCE.search(name):
        return "; for a GeForce or RTX card use --target trt-rtx"
    if OF_BOARDS.search(name) and not OF_CPUS.search(name):
        return "; for a Jetson or a data-centre GPU use --target trt, and ki-build there"
    if OF_CPUS.search(name):
        return "; for ONNX Runtime, on a CPU or through CUDA, use --target ort, the default of ki-export"
    return ""


def check_ahead(compute_capability: str, precision: str) -> None:
    """Before an export: whether TensorRT-RTX can compile for this list. `precision` as manifests call it.

    ArgumentError or BackendError as `build_bundle` would raise them.
    """
    api, wanted = Api.load(MODULES["trt-rtx"]), parse_capabilities(compute_capability)
    _check_known(api, wanted)
    check_precision(precision, wanted)


def capabilities_of(
    api: Api, device: Device | None, wanted: Sequence[Capability], *, lean: bool
) -> tuple[Capability, ...]:
    """What to compile for: the `wanted` capabilities, else those of this machine's GPU `device`.

    BackendError saying why this TensorRT cannot.
    """
    if not api.can_build:
        raise BackendError(f"{api.title} only runs engines: build them with tensorrt or tensorrt_rtx")
    if wanted and not api.is_rtx:
        raise BackendError(
            "TensorRT builds only on the GPU that will run the engines: run ki-build there, or compile ahead "
            "of time with --target trt-rtx --compute-capability"
        )
    if not wanted and device is None:
        raise BackendError(f"no NVIDIA GPU or driver here: {_elsewhere(api)}")
    if lean and api.is_rtx:
        raise BackendError("the lean runtime loads engines of TensorRT, not of TensorRT-RTX")
    found = tuple(wanted) or ((device.capability,) if device is not None else ())
    if api.is_rtx:
        _check_known(api, found)
    return found


def check_served(api: Api, device: Device) -> None:
    """BackendError if this TensorRT has no engines for the GPU: RTX has none for data centres' and Jetsons'."""
    if api.is_rtx:
        _check_known(api, [device.capability])


def _check_known(api: Api, wanted: Sequence[Capability]) -> None:
    unknown = [capability for capability in wanted if capability not in api.capabilities]
    if unknown:
        raise BackendError(
            f"{api.title} cannot compile for compute capability {describe_capabilities(unknown)}, only for "
            f"{describe_capabilities(api.capabilities)}; for other GPUs use TensorRT itself, or onnxruntime-gpu"
        )


def this_device(api: Api) -> Device:
    """This machine's GPU; BackendError where there is none, and what can be done."""
    try:
        device: Device = import_module("ki_runtime.gpu.cuda").current_device()
    except BackendError as error:
        raise BackendError(f"{error}; {_elsewhere(api)}") from error
    return device


def _elsewhere(api: Api) -> str:
    ahead = ", or name the GPU to compile for: --compute-capability 8.6" if api.is_rtx else ""
    return f"run ki-build BUNDLE on the robot{ahead}"
