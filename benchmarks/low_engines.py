"""Engines in 16, 8 and 4 bits: how long TensorRT-RTX compiles them, and how large they are beside their weights.

    python benchmarks/random_checkpoint.py build/hot --depth 2 --hot 0
    python benchmarks/low_engines.py build/hot build/low-engines                        (about an hour on two cores)
    python benchmarks/low_engines.py build/hot build/low-engines --calibrate RECORDED   (scales from your recordings)

Each precision is compiled for the compute capabilities that it is meant for, which need no GPU here: int8 for 8.6, fp8
for 8.9 and 12.0, nvfp4 for 12.0. Prints one row a graph. Bundles that lie in the work folder are not exported again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from ki_edge.bundle import MANIFEST, Bundle
from ki_export.bench.machine import describe
from ki_export.bench.tables import table
from ki_export.exporter import export
from ki_export.options import ExportOptions, Precision
from ki_runtime.trt.build import BuildOptions, build_bundle

TARGETS: dict[Precision, str] = {"fp16": "8.6,12.0", "int8": "8.6", "fp8": "8.9,12.0", "nvfp4": "12.0"}
HEAD = ("precision", "for", "graph", "weights, MB", "engine, MB", "ratio", "seconds")


def note(line: str) -> None:
    """A line of progress on stderr."""
    print(line, file=sys.stderr, flush=True)


def exported(checkpoint: Path, work: Path, precision: Precision, recorded: Path | None) -> Bundle:
    """A bundle of one precision, unproven, written unless it is there."""
    path = work / precision
    if (path / MANIFEST).is_file():
        return Bundle.open(path)
    options = ExportOptions(
        target="trt-rtx", precision=precision, model_only=True, verify=False, force=True, calibrate=recorded
    )
    return export(checkpoint, path, options, note)


def rows(bundle: Bundle, precision: Precision) -> Iterator[tuple[str, ...]]:
    """Compile all graphs of a bundle; one row each."""
    options = BuildOptions(graphs=tuple(bundle.manifest.graphs), force=True)
    engines = build_bundle(bundle.path, "trt-rtx", TARGETS[precision], options, note)
    for graph, folder in engines.of.items():
        made = folder.files[graph]
        sizes = f"{made.weights / 1e6:.1f}", f"{made.size / 1e6:.1f}", f"{made.size / made.weights:.2f}"
        yield precision, TARGETS[precision], graph, *sizes, f"{made.seconds:.1f}"


def main() -> None:
    """Export, compile, print the table."""
    parser = argparse.ArgumentParser(description="Time and size of engines in 16, 8 and 4 bits.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("work", type=Path, help="folder for bundles and engines")
    parser.add_argument("--precisions", default=",".join(TARGETS), metavar="NAME,...", help="which (%(default)s)")
    parser.add_argument("--calibrate", type=Path, metavar="FILE|DIR", help="recorded observations for the scales")
    arguments = parser.parse_args()
    wanted = arguments.precisions.split(",")
    if unknown := set(wanted) - set(TARGETS):
        parser.error(f"--precisions {', '.join(sorted(unknown))}: expected some of {', '.join(TARGETS)}")
    found = []
    for precision in (name for name in TARGETS if name in wanted):
        bundle = exported(arguments.checkpoint, arguments.work, precision, arguments.calibrate)
        found += list(rows(bundle, precision))
    print("\n".join(table(HEAD, found)))
    print(", ".join(f"{name} {value}" for name, value in describe().items()))


if __name__ == "__main__":
    main()
