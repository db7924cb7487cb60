"""float16 and bfloat16 against float32 in arithmetic that really rounds, over many observations; and engines compiled.

    python benchmarks/random_checkpoint.py build/hot --depth 2 --hot 0
    python benchmarks/float16.py build/hot build/float16                      (about ten minutes on two cores)
    python benchmarks/float16.py build/hot build/float16 --compile 8.6,12.0   (and the engines, with TensorRT-RTX)

Rows: the graphs with plain casts, as most exporters write them; with only what is too large scaled; as ki-export writes
them, with what is too small scaled too; in bfloat16. Actions of ten steps against the PyTorch model in float32; one to
three cameras, prompts of 1 to 31 tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

import ki_export.precision.decision
import ki_export.precision.sixteen_bits
from ki_edge.bundle import Bundle
from ki_edge.checkpoints import Checkpoint
from ki_edge.errors import BackendError
from ki_edge.model import Observation, PiModel, load_model
from ki_edge.policy.images import model_pictures
from ki_export.arithmetic.session import arithmetic_sampler
from ki_export.bench.machine import describe
from ki_export.bench.tables import table
from ki_export.exporter import export
from ki_export.options import ExportOptions
from ki_export.parity.cases import Array
from ki_export.precision.decision import Decision
from ki_export.precision.ranges_report import picture

STEPS = 10
PLAIN, LARGE, FLOAT16, BFLOAT16 = KINDS = ("float16, plain casts", "float16, large end only", "float16", "bfloat16")
Case = tuple[tuple[Array, ...], Array]


def observations(model: PiModel, count: int) -> Iterator[Case]:
    """Inputs of the prefix and noise, each with a seed of its own."""
    config = model.config
    for seed in range(count):
        rng = np.random.default_rng(seed)
        cameras, tokens, size = 1 + seed % 3, 1 + 10 * (seed % 4), config.vision.image_size
        images = model_pictures(rng.integers(0, 256, (1, cameras, size, size, 3)).astype(np.uint8), config.pictures)
        prompt = rng.integers(2, config.vocab_size, (1, tokens))
        noise = rng.standard_normal((1, config.action_horizon, config.action_dim), np.float32)
        yield (images, np.ones((1, cameras), np.bool_), prompt, np.ones((1, tokens), np.bool_)), noise


def write(kind: str, checkpoint: Path, work: Path) -> Bundle:
    """One of KINDS as an unproven bundle."""
    precision = "bf16" if kind == BFLOAT16 else "fp16"
    options = ExportOptions(target="trt", precision=precision, model_only=True, verify=False, force=True)
    path = work / kind.replace(", ", "_").replace(" ", "_")
    changes: dict[str, AbstractContextManager[object]] = {
        PLAIN: patch.object(ki_export.precision.sixteen_bits, "decide", lambda *_: Decision("fp16")),
        LARGE: patch.object(ki_export.precision.decision, "SMALL", 0.0),
    }
    with changes.get(kind, nullcontext()):
        return export(checkpoint, path, options, note)


def compare(bundle: Bundle, cases: list[Case], expected: list[Array]) -> tuple[str, ...]:
    """(not finite, smallest cosine, largest max abs, its median) over all observations."""
    sampler, cosines, errors, broken = arithmetic_sampler(bundle), [], [], 0
    for (inputs, noise), wanted in zip(cases, expected, strict=True):
        try:
            given = sampler.sample_actions(*inputs, noise=noise, num_steps=STEPS)
        except BackendError:  # the runtime refuses NaN
            broken += 1
            continue
        errors.append(float(np.abs(given - wanted).max()))
        cosines.append(float(np.vdot(given, wanted) / (np.linalg.norm(given) * np.linalg.norm(wanted))))
    if broken:
        return f"{broken} of {len(cases)}", "", "", ""
    return f"0 of {len(cases)}", f"{min(cosines):.8f}", f"{max(errors):.1e}", f"{np.median(errors):.1e}"


def note(line: str) -> None:
    """A line of progress on stderr."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Export, compare, print the table; compile if asked to."""
    parser = argparse.ArgumentParser(description="16-bit exports against float32, in arithmetic that really rounds.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("work", type=Path, help="folder for bundles, the picture and float16.json")
    parser.add_argument("--observations", type=int, default=24)
    parser.add_argument("--compile", metavar="X.Y,...", help="also compile all graphs for these compute capabilities")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    model = load_model(Checkpoint.open(arguments.checkpoint))
    cases = list(observations(model, arguments.observations))
    expected = []
    for inputs, noise in cases:
        observation = Observation(*map(torch.from_numpy, inputs))
        with torch.no_grad():
            found = model.sample_actions(observation, noise=torch.from_numpy(noise), num_steps=STEPS)
        expected.append(found.numpy())
    note(f"{len(cases)} observations in PyTorch float32")
    rows = [(kind, *compare(write(kind, arguments.checkpoint, arguments.work), cases, expected)) for kind in KINDS]
    head = ("actions against float32", "not finite", "smallest cosine", "largest error", "median")
    print("\n".join(table(head, rows)))
    ranges = json.loads((arguments.work / FLOAT16 / "ranges.json").read_text())
    (arguments.work / "headroom.png").write_bytes(picture(ranges))
    if arguments.compile:
        build(arguments.work, arguments.compile)
    print(", ".join(f"{name} {value}" for name, value in describe().items()))


def build(work: Path, capabilities: str) -> None:
    """Compile the 16-bit bundles with TensorRT-RTX and print time and size."""
    from ki_runtime.trt.build import BuildOptions, build_bundle

    for kind in (FLOAT16, BFLOAT16):
        start = time.perf_counter()
        engines = build_bundle(work / kind, "trt-rtx", capabilities, BuildOptions(force=True), note)
        size = sum(engines.path(graph).stat().st_size for graph in engines.of)
        print(f"{kind}: compiled for {capabilities} in {time.perf_counter() - start:.0f} s, {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
