"""ki-export: from a checkpoint of any format to a proven bundle. It speaks before PyTorch is imported."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ki_edge.commands import Parser, run_command, tell
from ki_edge.errors import ArgumentError
from ki_export.source.cli import add_checkpoint, named, request

NAME = "ki-export"
OF_TRITON = {"checkpoint", "triton", "target"}  # what --triton takes
MOVED = {"--inspect": "ki-inspect CHECKPOINT", "--build": "ki-build BUNDLE"}  # what they are now


class _Moved(argparse.Action):
    """A flag that became a command."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        parser.error(f"{self.option_strings[0]} is a command of its own: {self.const}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 if the bundle differs from the model (nothing is left); 2 for any other error."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.triton is not None:
        return run_command(NAME, lambda: _write_repository(options, parser))
    return run_command(NAME, lambda: _export(options), needs="export")


def _say(line: str) -> None:
    tell(f"{NAME}: {line}")


def _export(arguments: argparse.Namespace) -> int:
    start = time.perf_counter()
    if arguments.output is None:
        raise ArgumentError(
            f"no output: give -o BUNDLE; ki-inspect {arguments.checkpoint} tells what the checkpoint is"
        )
    target = arguments.target
    ahead = _ahead_of_time(arguments, target)
    if arguments.calibrate is not None and not arguments.calibrate.exists():
        raise ArgumentError(f"--calibrate {arguments.calibrate}: no such file or folder; expected recordings")
    _say(f"exporting {arguments.checkpoint}")
    from ki_export.source.examination import IncompleteError

    from .closing import closing_lines, next_lines
    from .exporter import export
    from .options import ON_CPU, ExportOptions

    options = ExportOptions(
        target=target,
        model_only=arguments.model_only,
        num_steps=arguments.num_steps,
        opset=arguments.opset,
        verify=not arguments.no_verify,
        force=arguments.force,
        full_vocabulary=arguments.full_vocabulary,
        fast_head=arguments.fast_head,
        pack=arguments.pack,
        link=arguments.link,
        precision=arguments.precision,
        weights="stored" if arguments.stored_types else "float32",
        calibrate=arguments.calibrate,
        keep_fp32=tuple(arguments.keep_fp32 or ()),
        keep=tuple(arguments.keep or ()),
        budget_cosine=arguments.budget_cosine,
        sensitivity=arguments.sensitivity,
        attention=arguments.attention,
        rtc=arguments.rtc,
        embeddings=arguments.embeddings,
        policy=request(arguments),
    )
    try:
        bundle = export(named(arguments), arguments.output, options, _say)
    except IncompleteError as error:
        for line in error.lines:
            _say(line)
        return 2
    for line in closing_lines(bundle, time.perf_counter() - start):
        _say(line)
    built = ahead or (target not in ON_CPU and _gpu_ready(target))
    if built:
        _build_engines(arguments)
    for line in next_lines(bundle, target, built=built, ahead=ahead):
        _say(line)
    return 0


def _write_repository(arguments: argparse.Namespace, parser: Parser) -> int:
    given = vars(arguments)
    others = [name for name in given if name not in OF_TRITON and given[name] != parser.get_default(name)]
    if others:
        names = ", ".join("-o" if name == "output" else f"--{name.replace('_', '-')}" for name in others)
        raise ArgumentError(
            f"--triton writes a model repository for a bundle that is there, and takes no {names}: export first, then "
            "ki-export --triton DIR BUNDLE"
        )
    from .triton import write_repository

    models = write_repository(arguments.checkpoint, arguments.triton, arguments.target, _say)
    _say(f"model repository in {arguments.triton}: {', '.join(models)}")
    _say(
        f"next: tritonserver --model-repository={arguments.triton} --model-control-mode=explicit --load-model=ki_policy"
    )
    return 0


def _build_engines(arguments: argparse.Namespace) -> None:
    from ki_runtime.trt.build import BuildOptions, build_bundle

    capabilities, options = arguments.compute_capability, BuildOptions(force=arguments.force)
    engines = build_bundle(arguments.output, arguments.target, capabilities, options, _say)
    _say(f"engines in {', '.join(map(str, engines.folders))}")


def _ahead_of_time(arguments: argparse.Namespace, target: str) -> bool:
    """Whether engines are compiled for GPUs that need not be here. Told before the export what would fail after it."""
    if arguments.compute_capability is None:
        return False
    if target != "trt-rtx":
        raise ArgumentError(f"--compute-capability is for --target trt-rtx: engines of {target} are built on their GPU")
    from ki_edge.dtypes import LOW_PRECISIONS, PRECISIONS
    from ki_runtime.trt.targets import check_ahead

    known = {**{short: dtype.name for short, dtype in PRECISIONS.items()}, **LOW_PRECISIONS}
    check_ahead(arguments.compute_capability, known.get(arguments.precision, "float16"))
    return True


def _gpu_ready(target: str) -> bool:
    """Whether engines can be built and run on this machine."""
    from ki_edge.errors import BackendError
    from ki_runtime.gpu.cuda import current_device
    from ki_runtime.trt.api import Api
    from ki_runtime.trt.targets import MODULES

    try:
        can_build = Api.load(MODULES[target]).can_build
        current_device()
    except BackendError:
        return False
    return can_build


def _parser() -> Parser:
    parser = Parser(
        prog=NAME,
        description="Turn a checkpoint into a bundle: its ONNX graphs, their weights and the policy contract, proven "
        "against the checkpoint's PyTorch model. ki-inspect tells what a checkpoint is and lacks; ki-build makes the "
        "TensorRT engines of a bundle on the robot.",
    )
    add = parser.add_argument_group("what to write").add_argument
    add("-o", "--output", type=Path, metavar="BUNDLE", help="bundle folder to write")
    add(
        "--target",
        default="ort",
        help="what will run it: ort for ONNX Runtime (a CPU, or a GPU through CUDA), openvino for OpenVINO (Intel's), "
        "trt for TensorRT (a Jetson), trt-rtx for TensorRT-RTX (%(default)s)",
    )
    add(
        "--precision",
        help="type in which layers are multiplied: fp32, fp16, bf16, int8, or for engines fp8 and nvfp4 (on a CPU: "
        "fp32, else fp16). In engines int8 needs compute capability 7.5, fp8 8.9, nvfp4 10.0",
    )
    add(
        "--calibrate",
        type=Path,
        metavar="FILE|DIR",
        help="fp16, and int8, fp8, nvfp4 of engines: measure ranges and scales on these recorded observations",
    )
    add("--keep", action="append", metavar="PATTERN", help="int8, fp8, nvfp4 of engines: layers that stay in 16 bits")
    add(
        "--budget-cosine",
        type=float,
        metavar="COSINE",
        help="int8, fp8, nvfp4 of engines: keep layers in 16 bits until actions hold this (0.999; nvfp4: 0.995)",
    )
    add("--keep-fp32", action="append", metavar="PATTERN", help="layers that stay in float32, such as 'vision.*'")
    add("--sensitivity", action="store_true", help="fp16, bf16: measure what each layer costs; a run of the model each")
    add(
        "--stored-types",
        action="store_true",
        help="keep the weights on disk in the checkpoint's own types, such as bfloat16, and widen them while running: "
        "the same results from a smaller file. It is no precision, which is about computing",
    )
    add("--num-steps", type=int, metavar="N", help="denoising steps recorded as the default (the contract's, or 10)")
    add("--no-verify", action="store_true", help="publish without proof; the manifest says so")
    add("--force", action="store_true", help="replace an existing bundle, once the new one is proven")
    add("--pack", action="store_true", help="write only the tensors in use, instead of the checkpoint's whole file")
    add("--link", action="store_true", help="share the checkpoint's file (hard link); checked whenever it is opened")
    add("--full-vocabulary", action="store_true", help="keep the logits of all tokens, not only those of FAST")
    add(
        "--fast-head",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="export the decoding of FAST tokens too (if the contract has FAST; of a model alone, if it is a π0.5)",
    )
    add(
        "--rtc",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="let chunks continue the one before: real-time chunking (on for ort, off for engines)",
    )
    add(
        "--embeddings",
        default="graph",
        metavar="graph|host",
        help="host: leave the table of embeddings in the weights file, from which the runtime reads the rows of an "
        "observation; 1 GB less on the device at full size, the same results (%(default)s)",
    )
    add("--opset", type=int, default=20, metavar="N", help="ONNX opset of the graphs (%(default)s)")
    add = parser.add_argument_group("TensorRT").add_argument
    add(
        "--compute-capability",
        metavar="X.Y,...",
        help="trt-rtx: also compile the engines here and now for these GPUs, such as 8.6,12.0",
    )
    add(
        "--triton",
        type=Path,
        metavar="DIR",
        help="write a model repository of Triton Inference Server for a bundle, given in the place of CHECKPOINT: its "
        "graphs on ONNX Runtime, with --target trt its engines on TensorRT, and the whole policy as a Python model",
    )
    add("--attention", default="decomposed", help="decomposed, or fused: one operator of TensorRT 10.14 (%(default)s)")
    add_checkpoint(parser)
    for flag, command in MOVED.items():
        parser.add_argument(flag, action=_Moved, nargs=0, const=command, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
