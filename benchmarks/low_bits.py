"""int8, fp8 and nvfp4 of engines against float32, in arithmetic that rounds as they do, over many observations.

    python benchmarks/low_bits.py examples/fetch/checkpoint build/low
    python benchmarks/random_checkpoint.py build/hot --depth 2 --hot 0
    python benchmarks/low_bits.py build/hot build/low-hot --cameras 1   (8 GB of memory; up to an hour on two cores)

Each precision as ki-export writes it: scales from built-in observations, the costliest layers in more bits until the
budget holds. Then 24 other observations, one to three cameras, prompts of 1 to 31 tokens: actions of ten steps against
the PyTorch model in float32. Prints one row a precision and writes low_bits.json, which has every observation.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from float16 import STEPS, Case, note, observations

import ki_export.exporter
from ki_edge.bundle import Bundle
from ki_edge.checkpoints import Checkpoint
from ki_edge.model import Observation, PiModel, load_model
from ki_export.arithmetic.session import arithmetic_sampler
from ki_export.bench.machine import describe
from ki_export.bench.tables import table
from ki_export.graphs.tracing import pack, unpack
from ki_export.options import ExportOptions
from ki_export.parity.cases import Array

PRECISIONS = ("fp16", "int8", "fp8", "nvfp4")
BARS = {"fp16": 0.99999, "int8": 0.999, "fp8": 0.999, "nvfp4": 0.995}


@dataclass(frozen=True)
class Row:
    """One precision. `cosines` and `errors` of each observation, `layers`: products by kind, `bytes` of weights."""

    precision: str
    cosines: list[float]
    errors: list[float]
    layers: dict[str, int]
    bytes: int

    def cells(self) -> tuple[str, ...]:
        """For people."""
        held = "yes" if min(self.cosines) >= BARS[self.precision] else "no"
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.layers.items())
        sizes = f"{min(self.cosines):.6f}", f"{np.median(self.cosines):.6f}", f"{max(self.errors):.1e}"
        return self.precision, kinds, f"{self.bytes / 1e6:.1f}", *sizes, f"{BARS[self.precision]}", held


def traced_once() -> Callable[..., Any]:
    """What the exporter traces with: a checkpoint's graphs once for all precisions."""
    trace, kept = ki_export.exporter.trace_all, {}

    def remembered(config: Any, vocabulary: Any, opset: int, say: Any) -> Any:
        key = (config, vocabulary, opset)
        if key not in kept:
            kept[key] = {name: pack(model) for name, model in trace(config, vocabulary, opset, say).items()}
        return {name: unpack(data) for name, data in kept[key].items()}

    return remembered


def answers(model: PiModel, cases: list[Case]) -> list[Array]:
    """The PyTorch model's actions."""
    found = []
    for inputs, noise in cases:
        with torch.no_grad():
            observation = Observation(*map(torch.from_numpy, inputs))
            found.append(model.sample_actions(observation, noise=torch.from_numpy(noise), num_steps=STEPS).numpy())
    return found


def compare(bundle: Bundle, precision: str, cases: list[Case], expected: list[Array]) -> Row:
    """All observations through the bundle's graphs."""
    sampler, cosines, errors = arithmetic_sampler(bundle), [], []
    for (inputs, noise), wanted in zip(cases, expected, strict=True):
        given = sampler.sample_actions(*inputs, noise=noise, num_steps=STEPS).astype(np.float64)
        errors.append(float(np.abs(given - wanted).max()))
        cosines.append(float(np.vdot(given, wanted) / (np.linalg.norm(given) * np.linalg.norm(wanted))))
    manifest = bundle.manifest
    kinds: Counter[str] = Counter()
    if "kinds" in manifest.weights:
        kinds.update({kind: len(sites) for kind, sites in manifest.weights["kinds"].items()})
        plan = json.loads((bundle.path / "ranges.json").read_text())["low_bits"]
        kinds["fp16"] = len(plan["kept"])
    size = sum(manifest.graphs[name]["weight_bytes"] for name in ("prefix", "denoise"))
    return Row(precision, cosines, errors, dict(kinds), size)


def main() -> None:
    """Export, compare, print the table."""
    parser = argparse.ArgumentParser(description="Engines' eight and four bits against float32.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("work", type=Path, help="folder for bundles and low_bits.json")
    parser.add_argument("--observations", type=int, default=24)
    parser.add_argument("--cameras", type=int, help="at most so many in an observation")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    model = load_model(Checkpoint.open(arguments.checkpoint))
    cases = [trim(case, arguments.cameras) for case in observations(model, arguments.observations)]
    expected = answers(model, cases)
    del model
    note(f"{len(cases)} observations in PyTorch float32")
    rows = []
    with patch.object(ki_export.exporter, "trace_all", traced_once()):
        for precision in arguments.precisions.split(","):
            options = ExportOptions(
                target="trt", precision=precision, model_only=True, fast_head=False, verify=False, force=True
            )
            bundle = ki_export.exporter.export(arguments.checkpoint, arguments.work / precision, options, note)
            rows.append(compare(bundle, precision, cases, expected))
            note(" | ".join(rows[-1].cells()))
            (arguments.work / "low_bits.json").write_text(json.dumps([vars(row) for row in rows], indent=1) + "\n")
    head = ("precision", "products", "MB", "smallest cosine", "median", "largest error", "bar", "held")
    print("\n".join(table(head, [row.cells() for row in rows])))
    print(", ".join(f"{name} {value}" for name, value in describe().items()))


def trim(case: Case, cameras: int | None) -> Case:
    """With at most so many cameras."""
    (images, mask, *prompt), noise = case
    return (images[:, :cameras], mask[:, :cameras], *prompt), noise


if __name__ == "__main__":
    main()
