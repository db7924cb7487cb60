"""ki-parity: a bundle against its own witness, its checkpoint, or recorded outputs, at any time and on any backend.

Against the witness it needs neither torch nor the checkpoint: that is what a robot has.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ki_edge.commands import Parser, printable, run_command, show, show_json, tell

if TYPE_CHECKING:
    from ki_edge.bundle import Bundle

    from .comparison import Comparison


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 if every bar holds; 1 if one does not; 2 for any other error."""
    options = _parser().parse_args(arguments)
    return run_command("ki-parity", lambda: _compare(options))


def _compare(arguments: argparse.Namespace) -> int:
    from ki_edge.bundle import Bundle
    from ki_edge.errors import ArgumentError

    if arguments.inputs is not None and arguments.outputs is None:
        raise ArgumentError("--inputs was given without --outputs: it names the inputs of recorded outputs")
    if arguments.checkpoint is None and arguments.outputs is None:
        if arguments.backend is None:
            raise ArgumentError("name what to compare with: --backend NAME for the witness, --checkpoint, or --outputs")
        if arguments.report is not None:
            raise ArgumentError("--report is of --checkpoint or --outputs: with the witness alone use --json")
        return _witness(Bundle.open(arguments.bundle), arguments)
    return _reference(Bundle.open(arguments.bundle), arguments)


def _witness(bundle: Bundle, arguments: argparse.Namespace) -> int:
    """Without torch."""
    from ki_edge.errors import ParityError
    from ki_runtime.policy.proof import refusal
    from ki_runtime.policy.proving import repeat_proof
    from ki_runtime.policy.verdict import table as witness_table

    verdicts = repeat_proof(bundle, arguments.backend, _say)
    backend = verdicts[0].environment["backend"]
    if arguments.json:
        found = {"verified": all(v.passed for v in verdicts), "verdicts": [v.to_json() for v in verdicts]}
        show_json(found)
    else:
        show(witness_table(verdicts))
    failed = next((verdict for verdict in verdicts if not verdict.passed), None)
    if failed is not None:
        raise ParityError(refusal(backend, failed, bundle))
    return 0


def _reference(bundle: Bundle, arguments: argparse.Namespace) -> int:
    """Against the PyTorch model of a checkpoint, or what another system recorded."""
    from ki_edge.checkpoints import Checkpoint
    from ki_edge.errors import ParityError

    from .parity import compare_with_checkpoint
    from .recorded import compare_with_recording
    from .report import to_json, write_report

    if arguments.checkpoint is not None:
        horizon = bundle.manifest.config.action_horizon  # of a checkpoint that does not record its own
        checkpoint = Checkpoint.open(arguments.checkpoint, default_horizon=horizon)
        comparison = compare_with_checkpoint(bundle, checkpoint, _say, backend=arguments.backend)
    else:
        comparison = compare_with_recording(bundle, arguments.outputs, arguments.inputs, backend=arguments.backend)
    if arguments.json:
        show_json(to_json(comparison, {}))
    else:
        show(table(comparison).rstrip("\n").split("\n"))
    if arguments.report is not None:
        arguments.report.mkdir(parents=True, exist_ok=True)
        write_report(arguments.report, comparison, bundle)
        tell(f"ki-parity: wrote {arguments.report / 'parity.html'}")
    if comparison.explanation is not None:
        raise ParityError(comparison.explanation)
    return 0


def _say(line: Any) -> None:
    tell(f"ki-parity: {line}")


def table(comparison: Comparison) -> str:
    """The worst error of each tensor, a line each, and that of the actions in words."""
    from .headline import actions_error, in_words

    groups: dict[tuple[str, str], list[int]] = {}
    for at, m in enumerate(comparison.measurements):
        groups.setdefault((m.graph, m.tensor), []).append(at)
    lines = [f"{'graph':12} {'tensor':17} {'error':>9} {'allowed':>9}  measure"]
    for (graph, tensor), places in groups.items():
        m = max((comparison.measurements[at] for at in places), key=lambda m: m.severity)
        verdict = "" if m.passed else "  FAILED"
        lines.append(f"{graph:12} {tensor:17} {m.error:9.2e} {m.limit:9.1e}  {m.metric}{verdict}")
    lines.append(f"{len(comparison.measurements)} comparisons with {printable(comparison.reference)}")
    actions = actions_error(comparison.measurements)
    return "\n".join(lines + ([] if actions is None else [in_words(actions)])) + "\n"


def _parser() -> Parser:
    parser = Parser(
        prog="ki-parity",
        description="Compare a bundle, as a backend of this machine computes it, with the witness that it carries; "
        "or with its checkpoint, or with recorded outputs.",
    )
    parser.add_argument("bundle", type=Path, help="folder written by ki-export")
    reference = parser.add_mutually_exclusive_group()
    reference.add_argument("--checkpoint", type=Path, help="checkpoint folder whose PyTorch model is the reference")
    reference.add_argument("--outputs", type=Path, metavar="FILE.npz", help="recorded outputs")
    parser.add_argument("--inputs", type=Path, metavar="FILE.npz", help="recorded inputs (default: inputs.npz beside)")
    parser.add_argument(
        "--backend",
        metavar="NAME",
        help="what computes the bundle: auto, trt, trt-rtx, ort-cuda, openvino, ort. Alone: against the witness, "
        "without PyTorch; default otherwise: ONNX Runtime on the CPU, 16-bit bundles in exact arithmetic",
    )
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="write parity.json and parity.html there")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
