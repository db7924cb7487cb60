"""ki-doctor: what this machine can run, what is missing, and how to mend it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ki_edge.commands import Parser, run_command, show, show_json
from ki_edge.errors import ArgumentError

NOTHING_RUNS = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 if something can run a bundle here (or the given one; with --for, if it fits the board; with
    --train, if the training fits), 1 if nothing can, 2 for an error.
    """
    options = _parser().parse_args(arguments)
    return run_command("ki-doctor", lambda: _examine(options), "nothing was changed")


def _examine(options: argparse.Namespace) -> int:
    from .checkup import examine

    if options.bundle is not None and not options.bundle.is_dir():
        what = "a checkpoint" if options.train else "a bundle written by ki-export"
        raise ArgumentError(f"no folder at {options.bundle}: expected {what}")
    if options.train:
        return _train(options)
    if options.board is not None:
        return _plan(options)
    checkup = examine(options.bundle)
    if options.json:
        show_json(checkup.to_json())
    else:
        show(checkup.lines())
    return 0 if checkup.runs else NOTHING_RUNS


def _plan(options: argparse.Namespace) -> int:
    from .boards import find_board
    from .plan import lines, plan

    board = find_board(options.board)
    found = plan(board, options.bundle)
    if options.json:
        show_json(found)
    else:
        show(lines(board, found))
    return 0 if found["fits"] else NOTHING_RUNS


def _train(options: argparse.Namespace) -> int:
    from .training import examine_training, training_lines

    if options.board is not None:
        raise ArgumentError("--for is of running a bundle, --train of training: ask one after the other")
    found = examine_training(options)
    if options.json:
        show_json(found)
    else:
        show(training_lines(found))
    return NOTHING_RUNS if found["fits"] is False else 0


def _parser() -> Parser:
    from .training import add_arguments

    parser = Parser(
        prog="ki-doctor",
        description="What this machine can run: Python, JetPack, GPU, driver, ONNX Runtime, TensorRT, memory, disk; "
        "with a bundle also whether it and its engines fit. Changes nothing.",
    )
    parser.add_argument(
        "bundle", type=Path, nargs="?", metavar="BUNDLE", help="folder written by ki-export; with --train a checkpoint"
    )
    parser.add_argument(
        "--for",
        "--board",
        dest="board",
        metavar="BOARD",
        help="does a bundle, or without one the full-size model, fit this board: orin-8gb, orin-16gb, orin-32gb, "
        "orin-64gb, thor, rtx-4090, rtx-5090, h100, h200",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    add_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
