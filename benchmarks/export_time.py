"""Seconds and peak memory of exports without proof and without a copy of the weights, a process each.

python benchmarks/export_time.py CHECKPOINT [CHECKPOINT ...]      (examples/fetch/checkpoint, a random checkpoint)
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ki_export.bench.tables import table

STAGE = re.compile(r"^ki-export: (.+) \((\d+\.\d) s\)$", re.MULTILINE)


def measure(checkpoint: Path) -> tuple[str, ...]:
    """A row: name, seconds, seconds of processor time, peak memory, stages. SystemExit if the export fails."""
    with tempfile.TemporaryDirectory() as folder:
        output = ["-o", f"{folder}/bundle", "--model-only", "--no-verify", "--stored-types", "--link"]
        command = [sys.executable, "-m", "ki_export.cli", str(checkpoint), *output]
        start = time.perf_counter()
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
    if status:
        raise SystemExit(said)
    stages = ", ".join(f"{what} {took} s" for what, took in STAGE.findall(said))
    busy = usage.ru_utime + usage.ru_stime
    return checkpoint.name, f"{seconds:.1f}", f"{busy:.1f}", f"{usage.ru_maxrss / 1e6:.2f}", stages


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="Time and memory of exports without proof.")
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    rows = [measure(checkpoint) for checkpoint in parser.parse_args().checkpoints]
    print("\n".join(table(("checkpoint", "seconds", "processor, s", "peak, GB", "stages"), rows)))


if __name__ == "__main__":
    main()
