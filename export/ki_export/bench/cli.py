"""ki-bench: what a bundle costs on this machine, and how far that is from what the machine can do."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ki_edge.commands import Parser, run_command, show, show_json, tell
from ki_edge.errors import BackendError, ExportError
from ki_edge.files.writing import write_file

from .options import CAMERAS, DTYPES, PICTURE_SIZE, PROMPT_TOKENS, BenchOptions

PICTURE = "bench.png"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 for an error, which is one line on stderr; 130 after Ctrl-C."""
    options = _parser().parse_intermixed_args(arguments)
    return run_command("ki-bench", lambda: _bench(options), "nothing was written")


def _bench(arguments: argparse.Namespace) -> int:
    options = BenchOptions(
        backend=arguments.backend,
        threads=arguments.threads,
        steps=arguments.steps,
        cameras=arguments.cameras,
        prompts=arguments.prompt,
        rounds=arguments.rounds,
        warm_up_s=arguments.warm_up,
        fast=arguments.fast_head,
        others=tuple(arguments.others),
        picture_size=arguments.picture_size,
        dtypes=arguments.dtypes,
        sequential=arguments.sequential,
    )
    picture = None if arguments.output is None else _place(arguments.output)
    try:
        from .benchmark import bench
        from .picture import draw
        from .tables import lines

        report = bench(arguments.bundle, options, lambda line: tell(f"ki-bench: {line}"))
    except ModuleNotFoundError as error:
        cure = "export" if error.name == "torch" else "bench"
        raise BackendError(f"the package {error.name} is not installed: pip install 'ki-edge[{cure}]'") from None
    if arguments.json:
        show_json(report.to_json())
    else:
        show(lines(report))
    if picture is not None:
        text = json.dumps(report.to_json(), indent=1)
        write_file(picture, draw(report), ExportError)
        write_file(picture.with_suffix(".json"), text + "\n", ExportError)
        tell(f"ki-bench: wrote {picture} and {picture.with_suffix('.json')}")
    return 0


def _place(output: Path) -> Path:
    """Path of the picture; its folder is made before anything is measured."""
    picture = output if output.suffix.lower() == ".png" else output / PICTURE
    picture.parent.mkdir(parents=True, exist_ok=True)
    return picture


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _size(text: str) -> tuple[int, int]:
    height, width = text.lower().split("x")
    return int(height), int(width)


_size.__name__ = "height and width (480x640)"
_numbers.__name__ = "list of integers"  # argparse names the type in its message


def _parser() -> Parser:
    defaults = BenchOptions()
    parser = Parser(
        prog="ki-bench",
        description="Latency by stage, memory, and the share of this machine's limit that a bundle reaches. "
        "Of several cameras, prompts and steps every combination is measured; the first of each is the main case.",
    )
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="folder written by ki-export")
    add(
        "others",
        nargs="*",
        default=(),  # else argparse calls them required
        type=Path,
        metavar="OTHER",
        help="compare with these, side by side: bundles, or checkpoints, which PyTorch runs as openpi does",
    )
    add("--backend", default=defaults.backend, metavar="NAME", help="engine; default: the best one installed")
    add("--threads", type=int, metavar="N", help="CPU threads of all sides; default: all cores")
    add("--steps", type=_numbers, default=(), metavar="N,...", help="denoising steps; default: the bundle's")
    add("--cameras", type=_numbers, default=(), metavar="N,...", help=f"cameras present; default: {CAMERAS}")
    add("--prompt", type=_numbers, default=(), metavar="N,...", help=f"tokens; default: {PROMPT_TOKENS}")
    add("--rounds", type=int, default=defaults.rounds, metavar="N", help="measurements; default: %(default)s")
    add("--warm-up", type=float, default=defaults.warm_up_s, metavar="S", help="seconds at most; default: %(default)s")
    add(
        "--picture-size", type=_size, metavar="HxW", help=f"of the cameras; default: {'x'.join(map(str, PICTURE_SIZE))}"
    )
    add("--fast-head", action="store_true", help="measure the decoding of FAST tokens too")
    add("--sequential", action="store_true", help="one graph in memory at a time; loading it is part of each stage")
    add("--dtypes", type=_words, default=DTYPES, metavar="TYPE,...", help=f"of PyTorch; default: {','.join(DTYPES)}")
    add("--output", type=Path, metavar="PNG|FOLDER", help="write a picture and the JSON there")
    add("--json", action="store_true", help="print the report as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
