"""ki-build: the TensorRT engines of an exported bundle, on the machine that will run them. Needs no PyTorch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ki_edge.commands import Parser, run_command, tell
from ki_edge.errors import ArgumentError
from ki_edge.graphs import GRAPHS

NAME = "ki-build"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 for any error, which leaves no engines behind."""
    options = _parser().parse_args(arguments)
    return run_command(NAME, lambda: _build(options))


def _build(arguments: argparse.Namespace) -> int:
    graphs = _graph_names(arguments.graphs)
    from .build import BuildOptions, build_bundle

    options = BuildOptions(
        graphs=graphs, ignore_memory=arguments.ignore_memory, force=arguments.force, lean=arguments.lean
    )
    capabilities = arguments.compute_capability
    engines = build_bundle(
        arguments.bundle, arguments.target, capabilities, options, lambda line: tell(f"{NAME}: {line}")
    )
    tell(f"{NAME}: engines in {', '.join(map(str, engines.folders))}")
    return 0


def _graph_names(text: str | None) -> tuple[str, ...] | None:
    """The graphs of --graphs; ArgumentError for one that no bundle has."""
    if text is None:
        return None
    known, names = [spec.name for spec in GRAPHS], tuple(part.strip() for part in text.split(","))
    if not set(names) <= set(known):
        raise ArgumentError(f"--graphs {text!r}: expected some of {','.join(known)}")
    return names


def _parser() -> Parser:
    parser = Parser(
        prog=NAME,
        description="Compile the graphs of a bundle to TensorRT engines for this machine's GPU and keep them in the "
        "bundle. ki-run does the same at its first start.",
    )
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="folder written by ki-export")
    add("--target", default="trt", help="trt for TensorRT, as on a Jetson, or trt-rtx for TensorRT-RTX (%(default)s)")
    add(
        "--compute-capability",
        metavar="X.Y,...",
        help="trt-rtx: compile for these GPUs, such as 8.6,12.0, which need not be in this machine",
    )
    add(
        "--graphs",
        metavar="NAME,...",
        help="which of prefix, denoise, fast_decode; default: the first two, and the last if the policy has FAST",
    )
    add("--lean", action="store_true", help="build engines that TensorRT's lean runtime can load too")
    add("--ignore-memory", action="store_true", help="build even if the estimate says that the memory is too small")
    add("--force", action="store_true", help="build again engines that are there already")
    return parser


if __name__ == "__main__":
    sys.exit(main())
