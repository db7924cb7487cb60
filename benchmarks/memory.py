"""Memory of a runtime process against the weights that it needs.

    python benchmarks/memory.py BUNDLE

A fresh process without torch opens the bundle and acts once (see `probe.py`). `weights` counts the bytes of the weights
file that acting needs, shared ones once; the embedding table counts whole, although only the prompt's rows are read.
The others are the process's own: resident memory at its peak and at the end, and the part of it that is no file's.
Exit status 1 if the bar is missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import onnx
from machine import cores, describe, print_machine, print_table

from ki_edge.bundle import Bundle

WEIGHTS_FACTOR, EXTRA_BYTES = 1.15, 300e6  # the peak is at most factor * weights + extra


def needed_bytes(bundle: Bundle) -> int:
    """Bytes of the weights file that two graphs and the time modulation read."""
    spans = set()
    for graph in ("prefix", "denoise"):
        for tensor in onnx.load(bundle.graph(graph), load_external_data=False).graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            if place:
                spans.add((int(place["offset"]), int(place["length"])))
    stored = bundle.weights()
    for name in bundle.manifest.weights["runtime"].values():
        spans.add((stored.entries[name].offset, stored.entries[name].nbytes))
    return sum(length for _, length in spans)


def process_memory(bundle: Bundle, threads: int, *, cameras: int = 2, tokens: int = 30) -> dict[str, int]:
    """Bytes: weights, rss_peak, rss, anonymous_peak, anonymous."""
    command = [sys.executable, str(Path(__file__).with_name("probe.py")), str(bundle.path), "--memory"]
    command += ["--threads", str(threads), "--cameras", str(cameras), "--tokens", str(tokens)]
    report = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    if report["torch_loaded"]:
        raise SystemExit("memory: the runtime imported torch, so this is no measurement of the runtime")
    return {"weights": needed_bytes(bundle), **report["memory"]}


def limit(memory: Mapping[str, int]) -> float:
    """Most bytes that the process may hold at its peak."""
    return WEIGHTS_FACTOR * memory["weights"] + EXTRA_BYTES


def print_memory(memory: Mapping[str, int]) -> None:
    """A table in MB."""
    print_table(("memory, MB", *memory, "bar"), [("", *(f"{n / 1e6:.0f}" for n in (*memory.values(), limit(memory))))])


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="Memory of the runtime on a bundle.")
    parser.add_argument("bundle", type=Path, help="folder written by ki-export")
    parser.add_argument("--threads", type=int, default=cores(), help="CPU threads (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    memory = process_memory(Bundle.open(options.bundle), options.threads)
    if options.json:
        print(json.dumps({"machine": describe(), "memory": memory, "limit": limit(memory)}, indent=1))
    else:
        print_machine()
        print_memory(memory)
    return 0 if memory["rss_peak"] <= limit(memory) else 1


if __name__ == "__main__":
    sys.exit(main())
