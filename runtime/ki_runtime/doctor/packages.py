"""Inference packages: ONNX Runtime and its providers, OpenVINO, the three TensorRT modules, cuda-python."""

from __future__ import annotations

from typing import Any

from ki_runtime.backends.session import first_line
from ki_runtime.gpu.ort_cuda import TRIAL
from ki_runtime.openvino.devices import devices, unreported
from ki_runtime.trt.api import OLDEST, TITLES, Api, parse_version
from ki_runtime.trt.requirements import OPERATORS, OPSETS

from .finding import Finding
from .gpu import Gpu
from .host import Host
from .system import Jetson

OPENVINO = "pip install 'ki-edge[openvino]'"
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
QUIET = 4  # fatal errors only
PROVIDER_CURES = {CPU: "--force-reinstall onnxruntime", CUDA: "'onnxruntime-gpu[cuda,cudnn]'"}
# module -> how to install it; in the order in which they are reported
TENSORRT = {
    "tensorrt": "pip install 'ki-edge[trt]'",
    "tensorrt_lean": "pip install tensorrt-lean-cu13",
    "tensorrt_rtx": "pip install 'ki-edge[rtx]'",
}
SYSTEM_PACKAGES = "/usr/lib"  # where JetPack's Python packages lie
JETPACK_CURE = "make the environment with `python3 -m venv --system-site-packages ENV`"


def check_onnxruntime(host: Host, gpu: Gpu | None) -> tuple[tuple[str, ...], list[Finding]]:
    """Providers that really load, CPU and CUDA, and what to say."""
    try:
        module = host.load("onnxruntime")
    except ImportError as error:
        fix = "pip install 'ki-edge[ort]'" + (" (or [ort-gpu] for the GPU)" if gpu else "")
        return (), [Finding("warning", "ONNX Runtime", f"cannot be imported: {error}", fix)]
    offered = [name for name in (CPU, CUDA) if name in module.get_available_providers()]
    wanted = [name for name in offered if name == CPU or gpu is not None]
    failures = {name: _try_provider(module, name) for name in wanted}
    good = tuple(name for name, failure in failures.items() if failure is None)
    short = ", ".join(name.removesuffix("ExecutionProvider") for name in good) or "none"
    found = [Finding("ok", "ONNX Runtime", f"{module.__version__}, providers that load: {short}")]
    if host.version("onnxruntime") and host.version("onnxruntime-gpu"):
        text = "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files"
        fix = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'ki-edge[ort-gpu]'"
        found.append(Finding("problem", "ONNX Runtime", text, fix))
    for name, failure in failures.items():
        if failure is not None:
            fix = f"pip install {PROVIDER_CURES[name]}"
            found.append(Finding("problem", "ONNX Runtime", f"{name} does not load: {failure}", fix))
    return good, found


def _try_provider(module: Any, provider: str) -> str | None:
    """Why a provider does not load, or None."""
    options = module.SessionOptions()
    options.log_severity_level = QUIET
    try:
        module.set_default_logger_severity(QUIET)
        used = module.InferenceSession(TRIAL, options, providers=[provider]).get_providers()
    except Exception as error:  # the library raises its own types
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    return None if provider in used else "its libraries (CUDA, cuDNN) are missing or of another version"


def check_openvino(host: Host) -> tuple[bool, Finding]:
    """Whether OpenVINO computes on the CPU here, its devices, and what each computes in."""
    try:
        with unreported():
            module = host.load("openvino")
    except ImportError as error:
        if "No module named" in str(error):
            return False, Finding("ok", "OpenVINO", "not installed; on Intel's CPUs and GPUs it may be faster")
        return False, Finding("problem", "OpenVINO", f"cannot be imported: {error}", f"{OPENVINO}, or remove it")
    try:
        found = devices(module.Core())
    except Exception as error:  # the library raises its own types
        why = first_line(error)
        return False, Finding("problem", "OpenVINO", f"{module.__version__} finds no devices: {why}", OPENVINO)
    told = "; ".join(f"{each.name}: {each.title} ({', '.join(each.roundings)})" for each in found) or "no devices"
    version = str(module.__version__).split("-")[0]
    return any(each.name == "CPU" for each in found), Finding("ok", "OpenVINO", f"{version}, {told}")


def check_tensorrt(host: Host, gpu: Gpu | None, jetson: Jetson | None) -> tuple[dict[str, Api], list[Finding]]:
    """The modules that can be used, by name, and what to say about each that matters here."""
    usable, findings = {}, []
    for name, install in TENSORRT.items():
        try:
            module = host.load(name)
        except ImportError as error:
            finding = _missing(host, name, str(error), gpu, jetson)
            findings += [finding] if finding else []
            continue
        text = str(module.__version__)
        api = Api(module, name, parse_version(text), text)
        if api.version < OLDEST[name]:
            fix = "flash JetPack 6.2 or newer" if jetson else f"{install} --upgrade"
            oldest = ".".join(map(str, OLDEST[name]))
            findings.append(Finding("problem", TITLES[name], f"{text}: too old, {oldest} or newer is needed", fix))
            continue
        usable[name] = api
        findings.append(Finding("ok", TITLES[name], f"{text}, {_abilities(api)}"))
    return usable, findings


def _abilities(api: Api) -> str:
    if not api.can_build:
        return "runs engines, builds none"
    if api.is_rtx:
        return "builds and runs engines for RTX GPUs"
    opset = max(opset for opset, first in OPSETS if api.version >= first)
    missing = [name for name, first in OPERATORS.items() if first is not None and api.version < first]
    return f"builds and runs engines; opsets to {opset}" + (f", without {', '.join(missing)}" if missing else "")


def _missing(host: Host, name: str, error: str, gpu: Gpu | None, jetson: Jetson | None) -> Finding | None:
    """What is worth saying about a module that cannot be imported: of `tensorrt` always, of others what is broken."""
    title, install = TITLES[name], TENSORRT[name]
    if "No module named" not in error:
        return Finding("problem", title, f"cannot be imported: {error}", f"{install}, or remove it")
    if name != "tensorrt":
        return None
    if gpu is None:
        return Finding("ok", title, "not installed, and not needed without a GPU")
    if host.find(SYSTEM_PACKAGES, "python3*/dist-packages/tensorrt") and host.in_virtual_environment:
        return Finding("problem", title, "JetPack's Python package is hidden by this virtual environment", JETPACK_CURE)
    fix = "sudo apt install nvidia-jetpack python3-libnvinfer" if jetson else install
    return Finding("warning", title, "not installed", fix)


def check_cuda_python(host: Host, gpu: Gpu | None) -> tuple[bool, Finding]:
    """Whether the bindings through which TensorRT's buffers are made fit the driver."""
    version = host.version("cuda-bindings")
    if version is None:
        if gpu is None:
            return False, Finding("ok", "cuda-python", "not installed, and not needed without a GPU")
        wanted = f"'cuda-python>=12.6,<{gpu.cuda[0] + 1}'" if gpu.cuda else "cuda-python"
        return False, Finding("warning", "cuda-python", "not installed: TensorRT needs it", f"pip install {wanted}")
    if gpu is not None and gpu.cuda is not None and parse_version(version)[0] > gpu.cuda[0]:
        text = f"{version} is newer than the driver, which is for CUDA {gpu.cuda[0]}.{gpu.cuda[1]}"
        return False, Finding("problem", "cuda-python", text, f"pip install 'cuda-python<{gpu.cuda[0] + 1}'")
    return True, Finding("ok", "cuda-python", version)
