"""How soon a robot's process is ready: imports, and from the first import to the first action.

    python benchmarks/startup.py BUNDLE

Each measurement is a fresh process (see `ki_export/bench/probe.py`); the bundle's files are in the page cache after the
first, which is not counted. Exit status 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from ki_edge.bundle import Bundle
from ki_edge.commands import run_command
from ki_export.bench.machine import describe
from ki_export.bench.process import Startup, start_once
from ki_export.bench.tables import table

# seconds, p50
BARS = {"import_s": 0.3, "import_policy_s": 0.3, "load_s": None, "first_action_s": 1.5}
LABELS = {
    "import_s": "import ki_runtime",
    "import_policy_s": "... and Policy, with numpy",
    "load_s": "loading the bundle alone",
    "first_action_s": "first action, from the first import",
}


def summarize(runs: Sequence[Startup]) -> dict[str, dict[str, Any]]:
    """p50, extremes and bar of each span."""
    found = {}
    for name in (field.name for field in fields(Startup)):
        values, bar = [getattr(run, name) for run in runs], BARS[name]
        p50 = float(np.median(values))
        held = bar is None or p50 <= bar
        found[name] = {"p50": p50, "min": min(values), "max": max(values), "bar": bar, "held": held}
    return found


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="Start-up time of the runtime on a bundle.")
    parser.add_argument("bundle", type=Path, help="folder written by ki-export")
    parser.add_argument("--rounds", type=int, default=7, help="fresh processes (%(default)s)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of the engine (its own choice)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    policy = Bundle.open(options.bundle).manifest.contract is not None
    arguments = ["policy" if policy else "model", *(["--threads", str(options.threads)] if options.threads else [])]
    runs = [start_once(options.bundle, *arguments) for _ in range(options.rounds + 1)][1:]
    spans = summarize(runs)
    if options.json:
        print(json.dumps({"machine": describe(), "rounds": options.rounds, "seconds": spans}, indent=1))
    else:
        print(", ".join(f"{name} {value}" for name, value in describe().items()))
        rows = []
        for name, x in spans.items():
            bar = "" if x["bar"] is None else f"{x['bar']:.1f} " + ("held" if x["held"] else "MISSED")
            rows.append((LABELS[name], f"{x['p50']:.3f}", f"{x['min']:.3f}", f"{x['max']:.3f}", bar))
        print("\n".join(table(("seconds", "p50", "min", "max", "bar"), rows)))
    return 0 if all(x["held"] for x in spans.values()) else 1


if __name__ == "__main__":
    sys.exit(run_command("startup", main))
