"""A full-size checkpoint on a small machine: export, proof and inference, with the time and the peak memory of each.

    python benchmarks/full_size.py CHECKPOINT WORK [--json]

Everything runs in processes of its own. Memory is the resident memory of a process and its children at its peak, pages
of mapped files counted in. The reference of the last column is the PyTorch model in float32, its weights streamed; both
sides get the same pictures, prompt and noise. Bundles are written into the folder WORK and removed again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil

from ki_edge.bundle import Bundle
from ki_export.bench.machine import describe
from ki_export.bench.tables import table

POLL_S = 0.02
BUNDLES = {  # name -> options of ki-export
    "16-bit weights kept": ["--stored-types"],
    "float32": [],
    "int8": ["--precision", "int8"],
}


@dataclass(frozen=True)
class Measured:
    """Seconds and peak bytes of a command; `note` is what else is to be said."""

    what: str
    seconds: float
    peak: int
    note: str = ""


def run(what: str, command: Sequence[str]) -> Measured:
    """Run a command to its end. SystemExit if it fails."""
    print(f"{what} ...", file=sys.stderr, flush=True)
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        peak = max(peak, _resident(process.pid))
        time.sleep(POLL_S)
    seconds = time.perf_counter() - start
    output = process.stdout.read() if process.stdout is not None else ""
    if process.returncode:
        raise SystemExit(f"{what}: exit status {process.returncode}")
    return Measured(what, seconds, peak, output.strip().splitlines()[-1] if output.strip() else "")


def measure(checkpoint: Path, work: Path) -> list[Measured]:
    """All rows of the table."""
    export = [sys.executable, "-m", "ki_export.cli", str(checkpoint), "--model-only", "--no-verify"]
    infer = [sys.executable, str(Path(__file__).with_name("full_size_inference.py"))]
    file = checkpoint / "model.safetensors"
    rows = [_copy("plain copy of the checkpoint's file", file, work)]
    reference = work / "reference.npy"
    rows.append(run("PyTorch float32, weights streamed", [*infer, "torch", str(checkpoint), str(reference)]))
    for name, options in BUNDLES.items():
        bundle, actions = work / name.replace(" ", "-"), work / "actions.npy"
        rows.append(run(f"export, {name}", [*export, "-o", str(bundle), "--force", *options]))
        if name == "float32":
            rows.append(_copy("plain copy of the float32 weights", bundle / "weights.safetensors", work))
        if name == "float32":
            parity = [sys.executable, "-m", "ki_export.parity.cli", str(bundle), "--checkpoint", str(checkpoint)]
            rows.append(run(f"verification, {name}", parity))
        size = sum(facts["size"] for facts in Bundle.open(bundle).manifest.files.values())
        found = run(f"inference, {name}", [*infer, "bundle", str(bundle), str(actions)])
        error = relative_error(np.load(actions), np.load(reference))
        note = f"{found.note}; bundle {size / 1e9:.2f} GB; relative error {error:.1e}"
        rows.append(Measured(found.what, found.seconds, found.peak, note))
        shutil.rmtree(bundle)
    return rows


def relative_error(given: np.ndarray, expected: np.ndarray) -> float:
    """L2 norm of the difference over that of the reference."""
    return float(np.linalg.norm(given - expected) / np.linalg.norm(expected))


def _copy(what: str, source: Path, work: Path) -> Measured:
    target = work / "copy"
    measured = run(what, [sys.executable, "-c", COPY, str(source), str(target)])
    target.unlink()
    return Measured(measured.what, measured.seconds, measured.peak, f"{source.stat().st_size / 1e9:.2f} GB")


COPY = "import os, shutil, sys; shutil.copyfile(*sys.argv[1:]); os.fsync(os.open(sys.argv[2], os.O_RDWR))"


def _resident(pid: int) -> int:
    """Of a process and all its children, in bytes."""
    try:
        parent = psutil.Process(pid)
        return sum(process.memory_info().rss for process in (parent, *parent.children(recursive=True)))
    except psutil.Error:
        return 0


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="Export, proof and inference of a full-size checkpoint.")
    parser.add_argument("checkpoint", type=Path, help="folder with model.safetensors")
    parser.add_argument("work", type=Path, help="folder for bundles, on the checkpoint's disk (30 GB)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    rows = measure(options.checkpoint, options.work)
    if options.json:
        print(json.dumps({"machine": describe(), "rows": [asdict(row) for row in rows]}, indent=1))
        return 0
    print(", ".join(f"{name} {value}" for name, value in describe().items()))
    cells = [(row.what, f"{row.seconds:.0f}", f"{row.peak / 1e9:.2f}", row.note) for row in rows]
    print("\n".join(table(("", "seconds", "peak, GB", ""), cells)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
