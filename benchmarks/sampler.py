"""The bars of the bundle's speed and memory, on one checkpoint; what is measured and how: docs/bench.md.

    python benchmarks/random_checkpoint.py build/depth4 --depth 4
    python benchmarks/sampler.py build/depth4

Two of three cameras are present, the prompt has 30 tokens, 10 denoising steps; PyTorch runs as openpi runs it, with the
same number of threads, in the same rounds. Exit status 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ki_edge.bundle import Bundle
from ki_edge.commands import run_command
from ki_export.bench.benchmark import bench
from ki_export.bench.options import BenchOptions
from ki_export.bench.process import Memory
from ki_export.bench.report import Report
from ki_export.bench.tables import lines
from ki_export.exporter import export
from ki_export.options import ExportOptions

SPEEDUP = {"float32": 5.0}  # PyTorch / bundle, total, by PyTorch's type: of a float32 bundle
PREFIX_REACHED = 0.85  # share of the limit that this machine's fastest product sets
DIFFERENCE = 2e-5  # max abs of the actions: the float32 bar of the export
WEIGHTS_FACTOR, EXTRA_BYTES = 1.15, 300e6  # the resident peak is at most factor * weights + extra


def memory_limit(memory: Memory) -> float:
    """Most bytes that a process may hold at its peak."""
    return WEIGHTS_FACTOR * memory.weights + EXTRA_BYTES


def missed_bars(report: Report) -> list[str]:
    """What is not as good as it must be."""
    exact = next(x for x in report.others if x.precision == "float32")
    bars = {
        f"{x.ratio.p50:.2f}x PyTorch {x.precision}, at least {SPEEDUP[x.precision]:g}x": x.ratio.p50
        >= SPEEDUP[x.precision]
        for x in report.others
        if x.precision in SPEEDUP
    }
    reached = report.main[0].reached
    bars[f"prefix at {100 * reached:.0f} % of the limit, at least {100 * PREFIX_REACHED:.0f} %"] = (
        reached >= PREFIX_REACHED
    )
    bars[f"difference {exact.max_abs_difference:.1e}, at most {DIFFERENCE:.0e}"] = (
        exact.max_abs_difference is not None and exact.max_abs_difference <= DIFFERENCE
    )
    if report.memory is not None:
        most = memory_limit(report.memory)
        bars[f"memory {report.memory.rss_peak / 1e6:.0f} MB, at most {most / 1e6:.0f}"] = report.memory.rss_peak <= most
    return [name for name, held in bars.items() if not held]


def main() -> int:
    """Parse, export if need be, measure, print."""
    parser = argparse.ArgumentParser(description="The exported runtime against PyTorch on the CPU, with its bars.")
    parser.add_argument("checkpoint", type=Path, help="checkpoint folder, for example of random_checkpoint.py")
    parser.add_argument("--bundle", type=Path, help="its export; made if it does not exist (CHECKPOINT-bundle)")
    parser.add_argument("--threads", type=int, help="CPU threads of both sides (all cores)")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each contender (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    path = options.bundle or options.checkpoint.with_name(options.checkpoint.name + "-bundle")
    if not path.exists():
        export(options.checkpoint, path, ExportOptions(model_only=True, verify=False))
    chosen = BenchOptions(
        others=(options.checkpoint,), threads=options.threads, rounds=options.rounds, steps=(10,), cameras=(2,)
    )
    report = bench(Bundle.open(path), chosen)
    missed = missed_bars(report)
    if options.json:
        print(json.dumps({**report.to_json(), "missed_bars": missed}, indent=1))
    else:
        print("\n".join(lines(report)))
        print(f"MISSED: {'; '.join(missed)}" if missed else "all bars held")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(run_command("sampler", main))
