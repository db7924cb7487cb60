"""What a fresh process needs to run a bundle: seconds and bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from ki_edge.bundle import Bundle
from ki_edge.errors import BackendError

PROBE = "ki_export.bench.probe"


@dataclass(frozen=True)
class Startup:
    """Seconds of a process's life: since its first import, but `load_s` from imports to a bundle that is ready."""

    import_s: float
    import_policy_s: float
    load_s: float
    first_action_s: float


@dataclass(frozen=True)
class Memory:
    """Bytes: what acting needs of the weights file; resident memory, its peak, and the part of it that is no file's."""

    weights: int
    rss_peak: int
    rss: int
    anonymous_peak: int
    anonymous: int


def start_once(bundle: Path, *arguments: str) -> Startup:
    """Times of one fresh process that acts once. BackendError with its last words if it fails."""
    report = _probe(bundle, *arguments)
    return Startup(**{name: report[name] for name in Startup.__dataclass_fields__})


def process_memory(bundle: Bundle, *arguments: str) -> Memory:
    """Memory of one fresh process that acts once (Linux only; see probe.py for `arguments`)."""
    report = _probe(bundle.path, *arguments, "--memory")
    if report["torch_loaded"]:
        raise BackendError("the runtime imported torch, so its process says nothing about the runtime")
    return Memory(needed_bytes(bundle), **report["memory"])


def needed_bytes(bundle: Bundle) -> int:
    """Bytes of the weights file that acting reads: two graphs and the time modulation, shared tensors once.

    The embedding table counts whole, although only the prompt's rows are read.
    """
    spans = set()
    for graph in ("prefix", "denoise"):
        for tensor in onnx.load(bundle.graph(graph), load_external_data=False).graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            if place:
                spans.add((place["location"], int(place["offset"]), int(place["length"])))
    stored = bundle.weights()
    for name in bundle.manifest.weights["runtime"].values():
        spans.add((stored.path.name, stored.entries[name].offset, stored.entries[name].nbytes))
    return sum(length for *_, length in spans)


def _probe(bundle: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", PROBE, str(bundle), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        words = result.stderr.strip().splitlines() or ["no message"]
        raise BackendError(f"a process that runs {bundle} once ended with status {result.returncode}: {words[-1]}")
    report: dict[str, Any] = json.loads(result.stdout)
    return report
