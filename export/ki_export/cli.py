"""ki-export: from a checkpoint of any format to a proven bundle; --inspect tells what a checkpoint is; --build makes
the engines of a bundle, without PyTorch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ki_edge.commands import Parser, run_command, show, show_json, tell
from ki_edge.errors import ArgumentError
from ki_edge.graphs import FAST_DECODE, GRAPHS
from ki_edge.policy.presets import SHORT

if TYPE_CHECKING:
    from ki_edge.bundle import Bundle
    from ki_export.source.opening import CheckpointRef

    from .policies import PolicyRequest

NAME = "ki-export"
FOR_ENGINES = ("build", "target", "compute_capability", "ignore_memory", "lean", "graphs", "force")  # of --build


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 if the bundle differs from the model (nothing is left); 2 for any other error."""
    options = _parser().parse_args(arguments)
    command = _build if options.build else _inspect if options.inspect else _export
    return run_command(NAME, lambda: command(options))


def _build(arguments: argparse.Namespace) -> int:
    """Engines of a bundle that is there already."""
    defaults = vars(_parser().parse_args([]))
    given = [name for name, value in vars(arguments).items() if value != defaults[name] and name not in FOR_ENGINES]
    if given:
        flags = ", ".join("a checkpoint" if name == "checkpoint" else f"--{name.replace('_', '-')}" for name in given)
        raise ArgumentError(f"--build BUNDLE makes the engines of an exported bundle: {flags} has no meaning there")
    _build_engines(arguments, arguments.build, "trt" if arguments.target is None else arguments.target)
    return 0


def _build_engines(arguments: argparse.Namespace, bundle: Path, target: str) -> None:
    from ki_runtime.trt.build import BuildOptions, build_bundle

    options = BuildOptions(
        graphs=_graph_names(arguments.graphs),
        ignore_memory=arguments.ignore_memory,
        force=arguments.force,
        lean=arguments.lean,
    )
    capabilities = arguments.compute_capability
    engines = build_bundle(bundle, target, capabilities, options, lambda line: tell(f"{NAME}: {line}"))
    tell(f"{NAME}: engines in {', '.join(map(str, engines.folders))}")


def _export(arguments: argparse.Namespace) -> int:
    start = time.perf_counter()
    if arguments.checkpoint is None:
        raise ArgumentError("no checkpoint: give a folder or a Hub's ORG/NAME, or --build BUNDLE for its engines")
    if arguments.output is None:
        raise ArgumentError("no output: give -o BUNDLE, or --inspect to see what the checkpoint is")
    if arguments.json:
        raise ArgumentError("--json goes with --inspect")
    target = arguments.target or "ort"
    ahead = _ahead_of_time(arguments, target)
    names = _graph_names(arguments.graphs)
    if names is not None and not ahead:
        raise ArgumentError("--graphs says which engines are built: it goes with --build or --compute-capability")
    builds_fast = FAST_DECODE.name in (names or ())
    if builds_fast and arguments.fast_head is False:
        raise ArgumentError(f"--graphs {FAST_DECODE.name} builds what --no-fast-head leaves away: leave one out")
    from .exporter import export
    from .options import ExportOptions

    options = ExportOptions(
        target=target,
        model_only=arguments.model_only,
        num_steps=arguments.num_steps,
        opset=arguments.opset,
        verify=not arguments.no_verify,
        force=arguments.force,
        full_vocabulary=arguments.full_vocabulary,
        fast_head=builds_fast or arguments.fast_head,
        pack=arguments.pack,
        link=arguments.link,
        precision=arguments.precision,
        weights=arguments.weights,
        calibrate=arguments.calibrate,
        keep_fp32=tuple(arguments.keep_fp32 or ()),
        sensitivity=arguments.sensitivity,
        attention=arguments.attention,
        policy=_request(arguments),
    )
    bundle = export(_where(arguments), arguments.output, options, lambda line: tell(f"{NAME}: {line}"))
    tell(f"{NAME}: {arguments.output}: {_summary(bundle)}, {time.perf_counter() - start:.0f} s, digest {bundle.digest}")
    if ahead or (target != "ort" and _gpu_ready(target)):
        _build_engines(arguments, arguments.output, target)
    elif target != "ort":
        flag = "" if target == "trt" else f" --target {target}"
        tell(f"{NAME}: engines are built on the robot: there, ki-export --build BUNDLE{flag}, or ki-run at first start")
    return 0


def _ahead_of_time(arguments: argparse.Namespace, target: str) -> bool:
    """Whether engines are compiled for GPUs that need not be here. Told before the export what would fail after it."""
    if arguments.compute_capability is None:
        return False
    if target != "trt-rtx":
        raise ArgumentError(f"--compute-capability is for --target trt-rtx: engines of {target} are built on their GPU")
    from ki_runtime.trt.targets import check_ahead

    check_ahead(
        arguments.compute_capability, {"bf16": "bfloat16", "fp32": "float32"}.get(arguments.precision, "float16")
    )
    return True


def _graph_names(text: str | None) -> tuple[str, ...] | None:
    """The graphs of --graphs; ArgumentError for one that no bundle has."""
    if text is None:
        return None
    known, names = [spec.name for spec in GRAPHS], tuple(part.strip() for part in text.split(","))
    if not set(names) <= set(known):
        raise ArgumentError(f"--graphs {text!r}: expected some of {','.join(known)}")
    return names


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


def _summary(bundle: Bundle) -> str:
    size = sum(facts["size"] for facts in bundle.manifest.files.values())
    how, parity = bundle.manifest.provenance["weights"], bundle.manifest.parity
    verdict = "not verified"
    if parity["verified"]:
        worst = parity["worst"]
        verdict = f"verified, worst error {worst['error']:.1e} of {worst['limit']:.1e} in {worst['tensor']}"
    return f"{size / 1e6:.1f} MB (weights {how}), {verdict}"


def _inspect(arguments: argparse.Namespace) -> int:
    from ki_export.source.inspection import inspect

    say = lambda line: tell(f"{NAME}: {line}")  # noqa: E731
    found = inspect(_where(arguments), _request(arguments), say, model_only=arguments.model_only)
    if arguments.json:
        show_json(found.to_json())
    else:
        show(found.lines())
    return 0


def _where(arguments: argparse.Namespace) -> CheckpointRef:
    from ki_export.source.opening import CheckpointRef

    return CheckpointRef(arguments.checkpoint, arguments.revision, arguments.base, arguments.horizon)


def _request(arguments: argparse.Namespace) -> PolicyRequest:
    from .policies import PolicyRequest

    return PolicyRequest(
        contract=arguments.contract,
        assets=arguments.assets,
        tokenizer=arguments.tokenizer,
        fast=arguments.fast,
        prompt=arguments.prompt,
        lerobot_version=arguments.lerobot_version,
    )


def _parser() -> Parser:
    parser = Parser(
        prog=NAME,
        description="Write the ONNX graphs of a checkpoint with their weights, and prove them against PyTorch.",
    )
    parser.add_argument(
        "checkpoint",
        nargs="?",
        help="folder of openpi (PyTorch or JAX), LeRobot, a PEFT adapter or ki-train; or ORG/NAME of the Hub",
    )
    _add_output(parser.add_argument_group("what to write"))
    _add_engines(parser.add_argument_group("TensorRT engines"))
    _add_source(parser.add_argument_group("where the checkpoint is"))
    _add_policy(parser.add_argument_group("what a checkpoint may not record of its policy"))
    return parser


def _add_output(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("-o", "--output", type=Path, metavar="BUNDLE", help="bundle folder to write")
    add("--inspect", action="store_true", help="write nothing; tell format, geometry, contract and what is missing")
    add("--json", action="store_true", help="with --inspect: as JSON")
    add("--target", help="engine that the bundle is for: ort, trt or trt-rtx (ort)")
    add("--precision", help="of the matrix products: fp32, fp16, bf16, or int8 for the CPU (ort: fp32, else fp16)")
    add("--calibrate", type=Path, metavar="FILE|DIR", help="fp16: measure ranges on these recorded observations (.npz)")
    add("--keep-fp32", action="append", metavar="PATTERN", help="products that stay float32, such as 'vision.*'")
    add("--weights", default="float32", help="float32, or stored: the checkpoint's own types, widened while running")
    add("--sensitivity", action="store_true", help="fp16, bf16: measure what each layer costs; a run of the model each")
    add("--model-only", action="store_true", help="the model alone, without tokenizer, statistics and contract")
    add("--num-steps", type=int, metavar="N", help="denoising steps recorded as the default (contract's, or 10)")
    add("--opset", type=int, default=20, metavar="N", help="ONNX opset of the graphs (%(default)s)")
    add("--no-verify", action="store_true", help="publish without proof; the manifest says so")
    add("--force", action="store_true", help="replace an existing bundle, once the new one is proven")
    add("--full-vocabulary", action="store_true", help="keep the logits of all tokens, not only FAST's")
    add(
        "--fast-head",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="export the decoding of FAST tokens too (if the contract has FAST; of a model alone, if it is a π0.5)",
    )
    add("--pack", action="store_true", help="write only the tensors in use, instead of the checkpoint's whole file")
    add("--link", action="store_true", help="share the checkpoint's file (hard link); checked at every open")


def _add_engines(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--build", type=Path, metavar="BUNDLE", help="build the engines of a bundle on this machine; needs no PyTorch")
    add(
        "--compute-capability",
        metavar="X.Y,...",
        help="trt-rtx: compile for these GPUs, such as 8.6,12.0, here and now",
    )
    add("--attention", default="decomposed", help="decomposed, or fused: one operator of TensorRT 10.14 (%(default)s)")
    add(
        "--graphs",
        metavar="NAME,...",
        help="build these of prefix, denoise, fast_decode; default: the first two, and the last if the policy has FAST",
    )
    add("--lean", action="store_true", help="with --build: engines that TensorRT's lean runtime loads too")
    add("--ignore-memory", action="store_true", help="build even if the estimate says that memory will not do")


def _add_source(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--revision", metavar="REV", help="branch, tag or commit of a Hub repository; its commit is recorded")
    add("--base", metavar="DIR_OR_ID", help="base checkpoint of a PEFT adapter, instead of the one it names")
    add("--horizon", type=int, metavar="N", help="actions of a chunk, where the checkpoint does not record them")


def _add_policy(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--contract", metavar="NAME|FILE", help=f"{', '.join(SHORT)}, a public configuration of openpi, or a file")
    add("--assets", type=Path, metavar="PATH", help="norm_stats.json, or a folder that holds one")
    add("--tokenizer", type=Path, metavar="PATH", help="tokenizer.model or .json, or their folder (the Hub's cache)")
    add("--fast", type=Path, metavar="DIR", help="folder of the FAST codec")
    add("--prompt", metavar="TEXT", help="instruction for observations that have none")
    add(
        "--lerobot-version",
        metavar="0.4|0.5",
        help="LeRobot that it was trained with, 0.5 for any newer (asked for where it matters and is not recorded)",
    )
    for flag, version in (("--padded-state-prompt", "0.4"), ("--no-padded-state-prompt", "0.5")):  # its names of before
        add(flag, dest="lerobot_version", action="store_const", const=version, help=argparse.SUPPRESS)


if __name__ == "__main__":
    sys.exit(main())
