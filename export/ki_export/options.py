"""What an export is asked for, checked before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args

import onnx

from ki_edge import flow
from ki_edge.config import Embeddings, RealTime
from ki_edge.dtypes import LOW_PRECISIONS, PRECISIONS
from ki_edge.errors import ArgumentError
from ki_export.graphs.tracing import MIN_OPSET
from ki_export.passes.low_plan import Kind
from ki_export.weights.weights import Stored
from ki_runtime.trt.targets import meant

from .policies import PolicyRequest

TARGETS = ("ort", "openvino", "trt", "trt-rtx")
ON_CPU = ("ort", "openvino")
OPSET = 20
Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8", "nvfp4"]
SIXTEEN = ("fp16", "bf16")
ENGINES = ("trt", "trt-rtx")  # targets whose products can be in eight and four bits with scales that stand in the graph
DEFAULTS: Mapping[str, Precision] = {
    "ort": "fp32",
    "openvino": "fp32",
    "trt": "fp16",
    "trt-rtx": "fp16",
}  # precision of each target


@dataclass(frozen=True)
class ExportOptions:
    """How to export. `num_steps` None: the contract's, or 10.

    `fast_head`: whether fast_decode is exported; None: as the contract says, of a π0.5 without a contract and with
    `full_vocabulary` yes;
    `precision` of the matrix products, None: the target's default; `weights`: "float32", or "stored" to keep the
    checkpoint's own types in the file and widen while running; `link`: share the checkpoint's file instead of taking
    its bytes (a change of it is noticed when the bundle is opened; nothing protects a running robot); `calibrate`:
    recorded observations for the range audit of fp16 and the scales of low products; `keep_fp32`: shell-style patterns
    of products that stay float32; `sensitivity`: measure what each layer costs in 16 bits; `keep`: patterns of products
    that stay in 16 bits; `budget_cosine`: of the actions, which low products have to hold, None: the precision's own;
    `attention` fused: one operator of opset 23 instead of several; `embeddings` host: graphs take rows of the embedding
    table, which the runtime reads from the weights file and no device holds; `rtc`: whether chunks can be made to
    continue the one before, None: for targets on a CPU; `policy`: what the checkpoint does not record.
    `inference`: what the bundle asks its engine to round products to, of float32 graphs: OpenVINO lowers them itself,
    so its target keeps them and `precision` becomes fp32.
    """

    target: str = "ort"
    model_only: bool = False
    num_steps: int | None = None
    opset: int = OPSET
    verify: bool = True
    force: bool = False
    full_vocabulary: bool = False
    fast_head: bool | None = None
    pack: bool = False
    precision: Precision | None = None
    weights: Stored = "float32"
    link: bool = False
    calibrate: Path | None = None
    keep_fp32: tuple[str, ...] = ()
    sensitivity: bool = False
    keep: tuple[str, ...] = ()
    budget_cosine: float | None = None
    attention: Literal["decomposed", "fused"] = "decomposed"
    rtc: bool | None = None
    embeddings: Embeddings = "graph"
    policy: PolicyRequest = field(default_factory=PolicyRequest)
    inference: str | None = None

    def __post_init__(self) -> None:
        if self.precision is None:
            object.__setattr__(self, "precision", DEFAULTS.get(self.target, "fp32"))
        if self.target not in TARGETS:
            expected = ", ".join(TARGETS)
            raise ArgumentError(f"target {self.target!r}: expected one of {expected}{meant(self.target)}")
        choices = {
            "precision": get_args(Precision),
            "weights": get_args(Stored),
            "embeddings": get_args(Embeddings),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ArgumentError(f"{name} {getattr(self, name)!r}: expected one of {', '.join(known)}")
        if self.target == "openvino" and self.precision in SIXTEEN:
            object.__setattr__(self, "inference", PRECISIONS[str(self.precision)].name)
            object.__setattr__(self, "precision", "fp32")
        if self.inference is not None and (self.target, self.precision) != ("openvino", "fp32"):
            raise ArgumentError(f"inference {self.inference!r} is for target openvino in fp32, fp16 or bf16")
        if self.target == "openvino" and self.precision == "int8":
            raise ArgumentError("precision int8 is for ONNX Runtime on a CPU: target openvino takes fp32 or bf16")
        if self.precision in ("fp8", "nvfp4") and self.low is None:
            raise ArgumentError(
                f"precision {self.precision} is for engines: give --target trt or trt-rtx; target {self.target} takes "
                f"{'fp32 or bf16' if self.target == 'openvino' else 'fp32 or int8'}"
            )
        self._check_low()
        if self.sixteen and self.weights == "stored":
            raise ArgumentError(
                f"--stored-types keeps the checkpoint's types, precision {self.precision} stores its own: leave one out"
            )
        if self.link and (self.pack or self.sixteen or self.precision == "int8"):
            other = "pack" if self.pack else f"precision {self.precision}"
            raise ArgumentError(f"--link shares the checkpoint's file, and {other} writes another: leave one out")
        if (self.calibrate is not None or self.keep_fp32 or self.sensitivity) and not self.sixteen:
            raise ArgumentError(
                "--calibrate, --keep-fp32 and --sensitivity are for precision fp16 and bf16, and for int8, fp8 and "
                f"nvfp4 of engines, not {self.precision}"
            )
        if self.calibrate is not None and self.precision == "bf16" and not self.sensitivity:
            raise ArgumentError("--calibrate has no effect with bf16, which needs no range audit: add --sensitivity")
        if self.attention not in ("decomposed", "fused"):
            raise ArgumentError(f"attention {self.attention!r}: expected decomposed or fused")
        if self.attention == "fused" and (self.precision not in SIXTEEN or self.target in ON_CPU):
            raise ArgumentError(
                f"attention fused is for targets trt and trt-rtx in fp16 or bf16, not {self.target} in "
                f"{self.precision}: TensorRT has no such kernel for float32"
            )
        if self.full_vocabulary and self.fast_head is False:
            raise ArgumentError(
                "--full-vocabulary is of the FAST head's logits, and --no-fast-head exports none of them"
            )
        newest = onnx.defs.onnx_opset_version()
        if not MIN_OPSET <= self.opset <= newest:
            raise ArgumentError(f"opset {self.opset}: expected {MIN_OPSET} to {newest} with onnx {onnx.__version__}")
        if self.num_steps is not None:
            flow.check_steps(self.num_steps)

    def real_time(self, max_delay: int | None) -> RealTime:
        """What the denoise graph is told of the chunk before, of a policy trained for delays up to `max_delay`."""
        wanted = self.target in ON_CPU if self.rtc is None else self.rtc
        return ("trained" if max_delay else "guided") if wanted else "none"

    def _check_low(self) -> None:
        if (self.keep or self.budget_cosine is not None) and self.low is None:
            raise ArgumentError(
                "--keep and --budget-cosine are for precision int8, fp8 and nvfp4 of the targets trt and trt-rtx, not "
                f"for {self.precision} of {self.target}"
            )
        if self.budget_cosine is not None and not 0.0 < self.budget_cosine < 1.0:
            raise ArgumentError(
                f"--budget-cosine {self.budget_cosine}: expected a cosine between 0 and 1, such as 0.999"
            )

    @property
    def low(self) -> Kind | None:
        """The eight or four bits in which engines multiply; None for all that has 16 bits or more, or is for a CPU."""
        return cast(Kind, self.precision) if self.precision in LOW_PRECISIONS and self.target in ENGINES else None

    @property
    def sixteen(self) -> bool:
        """Whether products are computed in 16 bits, or those that are not low are."""
        return self.precision in SIXTEEN or self.low is not None

    @property
    def base(self) -> str:
        """The 16 bits of everything that is in neither 8 nor 4."""
        return "fp16" if self.low is not None else str(self.precision)

    @property
    def recorded_precision(self) -> str:
        """As the manifest calls it."""
        return PRECISIONS[str(self.precision)].name if self.low is None else LOW_PRECISIONS[self.low]
