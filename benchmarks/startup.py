"""How soon a robot's process is ready: imports, and from the first import to the first action.

    python benchmarks/startup.py BUNDLE

Each measurement is a fresh process (see `probe.py`); the bundle's files are in the page cache after the first, which is
not counted. Exit status 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe, print_machine, print_table

# seconds, p50
BARS = {"import_s": 0.3, "import_policy_s": 0.3, "first_action_s": 1.5, "process_s": None}
LABELS = {
    "import_s": "import ki_runtime",
    "import_policy_s": "... and Policy, with numpy",
    "first_action_s": "... and the first action",
    "process_s": "whole process",
}


def start_once(bundle: Path, threads: int | None) -> dict[str, float]:
    """Seconds of one fresh process, by what it had done."""
    command = [sys.executable, str(Path(__file__).with_name("probe.py")), str(bundle)]
    command += ["--threads", str(threads)] if threads else []
    begin = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begin
    if result.returncode:
        raise SystemExit(f"startup: {bundle} cannot be run:\n{result.stderr}")
    report = json.loads(result.stdout)
    return {**{name: report[name] for name in BARS if name != "process_s"}, "process_s": seconds}


def summarize(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """p50, extremes and bar of each span."""
    found = {}
    for name, bar in BARS.items():
        values = [run[name] for run in runs]
        p50 = float(np.median(values))
        found[name] = {
            "p50": p50,
            "min": min(values),
            "max": max(values),
            "bar": bar,
            "held": bar is None or p50 <= bar,
        }
    return found


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="Start-up time of the runtime on a bundle.")
    parser.add_argument("bundle", type=Path, help="folder written by ki-export")
    parser.add_argument("--rounds", type=int, default=7, help="fresh processes (%(default)s)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of the engine (its own choice)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    runs = [start_once(options.bundle, options.threads) for _ in range(options.rounds + 1)][1:]
    spans = summarize(runs)
    if options.json:
        print(json.dumps({"machine": describe(), "rounds": options.rounds, "seconds": spans}, indent=1))
    else:
        print_machine()
        rows = []
        for name, x in spans.items():
            bar = "" if x["bar"] is None else f"{x['bar']:.1f} " + ("held" if x["held"] else "MISSED")
            rows.append((LABELS[name], f"{x['p50']:.3f}", f"{x['min']:.3f}", f"{x['max']:.3f}", bar))
        print_table(("seconds", "p50", "min", "max", "bar"), rows)
    return 0 if all(x["held"] for x in spans.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
