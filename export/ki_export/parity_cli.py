"""ki-parity: compare a bundle with its checkpoint, or with recorded outputs, at any time."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ki_edge.commands import Parser, run_command, tell

if TYPE_CHECKING:
    from .comparison import Comparison


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 if every bar holds; 1 if one does not; 2 for any other error."""
    options = _parser().parse_args(arguments)
    return run_command("ki-parity", lambda: _compare(options))


def _compare(arguments: argparse.Namespace) -> int:
    from ki_edge.bundle import Bundle
    from ki_edge.errors import ArgumentError, ParityError
    from ki_edge.model import Checkpoint

    from .parity import compare_with_checkpoint, report_facts
    from .ranges_report import read_ranges
    from .recorded import compare_with_recording
    from .report import write_report

    if arguments.inputs is not None and arguments.outputs is None:
        raise ArgumentError("--inputs was given without --outputs: it names the inputs of recorded outputs")
    bundle = Bundle.open(arguments.bundle)
    if arguments.checkpoint is not None:
        horizon = bundle.manifest.config.action_horizon  # of a checkpoint that does not record its own
        checkpoint = Checkpoint.open(arguments.checkpoint, default_horizon=horizon)
        comparison = compare_with_checkpoint(bundle, checkpoint, lambda line: tell(f"ki-parity: {line}"))
    else:
        comparison = compare_with_recording(bundle, arguments.outputs, arguments.inputs)
    sys.stdout.write(table(comparison))
    if arguments.report is not None:
        arguments.report.mkdir(parents=True, exist_ok=True)
        write_report(arguments.report, comparison, report_facts(bundle), read_ranges(bundle.path))
        tell(f"ki-parity: wrote {arguments.report / 'parity.html'}")
    if comparison.explanation is not None:
        raise ParityError(comparison.explanation)
    return 0


def table(comparison: Comparison) -> str:
    """The worst error of each tensor, a line each."""
    groups: dict[tuple[str, str], list[int]] = {}
    for at, m in enumerate(comparison.measurements):
        groups.setdefault((m.graph, m.tensor), []).append(at)
    lines = [f"{'graph':12} {'tensor':12} {'error':>9} {'bar':>9}"]
    for (graph, tensor), places in groups.items():
        m = max((comparison.measurements[at] for at in places), key=lambda m: m.severity)
        verdict = "" if m.passed else "  FAILED"
        lines.append(f"{graph:12} {tensor:12} {m.error:9.2e} {m.limit:9.1e}  {m.metric}{verdict}")
    lines.append(f"{len(comparison.measurements)} comparisons with {comparison.reference}")
    return "\n".join(lines) + "\n"


def _parser() -> Parser:
    parser = Parser(prog="ki-parity", description="Compare a bundle with its checkpoint or with recorded outputs.")
    parser.add_argument("bundle", type=Path, help="folder written by ki-export")
    reference = parser.add_mutually_exclusive_group(required=True)
    reference.add_argument("--checkpoint", type=Path, help="checkpoint folder whose PyTorch model is the reference")
    reference.add_argument("--outputs", type=Path, metavar="FILE.npz", help="recorded outputs")
    parser.add_argument("--inputs", type=Path, metavar="FILE.npz", help="recorded inputs (default: inputs.npz beside)")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="write parity.json and parity.html there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
