"""The exports that `benchmarks/precision.py` compares, and what computes each of them here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ki_edge.bundle import Bundle
from ki_export.exporter import export
from ki_export.options import ExportOptions
from ki_runtime.policy.sampler import Sampler

ACTING = ("prefix", "denoise")  # graphs that acting needs


@dataclass(frozen=True)
class Contender:
    """A precision and what computes it: `backend` of the runtime, or "" for the arithmetic that rounds as a GPU does.

    `bits` of weights and products of most layers, for the floor on devices, and the first compute capability that has
    them; 0 for what is made for a CPU.
    """

    key: str
    precision: str
    target: str
    option: str
    backend: str = ""
    bits: float = 0
    capability: tuple[int, int] = (0, 0)

    @property
    def engine(self) -> str:
        """What computes it, for people."""
        return {"ort": "ONNX Runtime", "": "its arithmetic"}.get(self.backend, "OpenVINO")

    @property
    def folder(self) -> str:
        """Of its export: contenders that run one bundle share it."""
        return f"{self.target}-{self.option}"


CONTENDERS = (
    Contender("fp32", "float32", "ort", "fp32", "ort"),
    Contender("openvino", "float32", "ort", "fp32", "openvino"),
    Contender("openvino-bf16", "bfloat16", "ort", "fp32", "openvino:bf16"),
    Contender("int8", "int8, scales as it runs", "ort", "int8", "ort"),
    Contender("fp16", "float16", "trt", "fp16", "", 16, (0, 0)),
    Contender("bf16", "bfloat16", "trt", "bf16", "", 16, (8, 0)),
    Contender("static-int8", "int8, static scales", "trt", "int8", "", 8, (7, 5)),
    Contender("fp8", "float8", "trt", "fp8", "", 8, (8, 9)),
    Contender("nvfp4", "nvfp4", "trt", "nvfp4", "", 4.5, (10, 0)),
)


def exported(checkpoint: Path, folder: Path, contender: Contender, *, policy: bool) -> Bundle:
    """The export of a contender, or the one that lies in `folder` already. `policy`: with its contract."""
    path = folder / contender.folder
    if path.exists():
        return Bundle.open(path)
    settings: dict[str, Any] = {"target": contender.target, "precision": contender.option}
    return export(checkpoint, path, ExportOptions(model_only=not policy, verify=False, **settings))


def opened(bundle: Bundle, contender: Contender) -> Sampler:
    """What computes a contender's export. BackendError where this machine cannot."""
    if contender.backend:
        return Sampler.open(bundle, contender.backend)
    from ki_export.arithmetic.session import arithmetic_sampler

    return arithmetic_sampler(bundle)


def acting_bytes(bundle: Bundle) -> int:
    """Bytes of the weights that acting needs; what graphs share counts once."""
    found: dict[tuple[str, int], int] = {}
    for name in ACTING:
        for value in ir.load(bundle.graph(name)).graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                found[str(tensor.path), int(tensor.offset or 0)] = int(tensor.length or tensor.nbytes)
    return sum(found.values())
