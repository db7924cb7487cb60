"""ki-export: from a checkpoint folder to a proven bundle."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from ki_edge.errors import KiEdgeError, ParityError

INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument as one line on stderr, like every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 if the bundle differs from the model (nothing is left); 2 for any other error."""
    options = _parser().parse_args(arguments)
    return run_command("ki-export", lambda: _export(options))


def run_command(name: str, command: Callable[[], int]) -> int:
    """Run a command, its errors as one line on stderr and an exit status."""
    try:
        return command()
    except KeyboardInterrupt:
        tell(f"{name}: interrupted; nothing was published")
        return INTERRUPTED
    except (KiEdgeError, OSError) as error:
        tell(f"{name}: error: {' '.join(str(error).split())}")
        return 1 if isinstance(error, ParityError) else 2


def tell(line: str) -> None:
    """A line on stderr, at once."""
    print(line, file=sys.stderr, flush=True)


def _export(arguments: argparse.Namespace) -> int:
    start = time.perf_counter()
    from .exporter import ExportOptions, export

    options = ExportOptions(
        target=arguments.target,
        model_only=arguments.model_only,
        num_steps=arguments.num_steps,
        opset=arguments.opset,
        verify=not arguments.no_verify,
        force=arguments.force,
        full_vocabulary=arguments.full_vocabulary,
        pack=arguments.pack,
    )
    bundle = export(arguments.checkpoint, arguments.output, options, lambda line: tell(f"ki-export: {line}"))
    size = sum(facts["size"] for facts in bundle.manifest.files.values())
    how, parity = bundle.manifest.provenance["weights"], bundle.manifest.parity
    verdict = "not verified"
    if parity["verified"]:
        worst = parity["worst"]
        verdict = f"verified, worst error {worst['error']:.1e} of {worst['limit']:.1e} in {worst['tensor']}"
    seconds = time.perf_counter() - start
    tell(f"ki-export: {arguments.output}: {size / 1e6:.1f} MB (weights {how}), {verdict}, {seconds:.0f} s")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="ki-export",
        description="Write the three ONNX graphs of a checkpoint with their weights, and prove them against PyTorch.",
    )
    add = parser.add_argument
    add("checkpoint", type=Path, help="folder with model.safetensors, as openpi, LeRobot or ki-train write it")
    add("-o", "--output", type=Path, required=True, metavar="BUNDLE", help="bundle folder to write")
    add("--target", default="ort", help="engine that the bundle is for: ort (%(default)s)")
    add("--model-only", action="store_true", help="the model alone, without tokenizer, statistics and contract")
    add("--num-steps", type=int, help="denoising steps recorded as the default (contract's, or 10)")
    add("--opset", type=int, default=20, help="ONNX opset of the graphs (%(default)s)")
    add("--no-verify", action="store_true", help="publish without proof; the manifest says so")
    add("--force", action="store_true", help="replace an existing bundle, once the new one is proven")
    add("--full-vocabulary", action="store_true", help="keep the logits of all tokens, not only FAST's")
    add("--pack", action="store_true", help="write only the tensors in use, instead of linking the checkpoint's file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
