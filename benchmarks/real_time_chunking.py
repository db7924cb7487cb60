"""What the denoise graph's inputs for real-time chunking cost on this CPU, as ratios to the graph without them.

    python benchmarks/real_time_chunking.py                             (an action expert of the real widths, 4 layers)
    python benchmarks/real_time_chunking.py examples/fetch/checkpoint   (the shipped policy)

The same checkpoint is exported without them, guided and trained, and all three run in turn, ten steps a run, over the
same K/V: alone, and continuing a chunk. Processor time is taken, on one thread, which neighbours disturb least, and
each ratio is the median of those of single rounds. Without a checkpoint a random one is made whose backbone is narrow;
the denoise graph sees nothing of that but its K/V. Exit status 1 if guided costs more than 2 %.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from ki_edge import graphs
from ki_edge.bundle import Bundle
from ki_edge.commands import run_command
from ki_edge.config import PI05, Pi05Config, RealTime, VisionConfig
from ki_edge.model import Pi05, save_checkpoint
from ki_edge.overlap import Overlap, prefix_weights
from ki_export.exporter import export
from ki_export.options import ExportOptions
from ki_runtime.backends.backend import SessionOptions
from ki_runtime.backends.registry import choose_backend, open_session
from ki_runtime.policy.denoise import DenoiseStage, runtime_weights
from ki_runtime.policy.prefix import Prefix

STEPS = 10
WAYS: tuple[RealTime, ...] = ("none", "guided", "trained")
MOST = 1.02  # times the step without, for guided: above it they would belong into a graph of their own


@dataclass(frozen=True)
class Asked(ExportOptions):
    """An export whose denoise graph is chosen here, whatever the policy was trained for."""

    way: RealTime = "none"

    def real_time(self, max_delay: int | None) -> RealTime:
        return self.way


def write_expert(folder: Path, depth: int) -> None:
    """A random checkpoint: the real action expert with so many layers, behind a narrow backbone."""
    heads = PI05.expert
    config = replace(
        PI05,
        vision=VisionConfig(width=16, depth=1, mlp_dim=16, num_heads=2, patch_size=14, image_size=28),
        backbone=replace(heads, width=64, mlp_dim=64, depth=depth),
        expert=replace(heads, depth=depth),
        vocab_size=1024,
    )
    torch.manual_seed(0)
    model = Pi05(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
    save_checkpoint(model, folder)


def stage_of(bundle: Bundle, tokens: int) -> tuple[DenoiseStage, Prefix]:
    """The denoise graph of a bundle, and random K/V for it."""
    config = bundle.manifest.config
    spec = graphs.specs(config)[1]
    session = open_session(bundle, spec, choose_backend("ort"), SessionOptions(1))
    sizes, rng = {**session.sizes, "B": 1, "S": tokens}, np.random.default_rng(0)
    parts = []
    for name in ("prefix_k", "prefix_v", "prefix_mask"):
        tensor = spec.tensor(name)
        parts.append(session.allocate([int(dim) for dim in tensor.resolve(sizes)], tensor.dtype))
        parts[-1].write(rng.standard_normal(parts[-1].shape).astype(tensor.dtype))
    parts[2].write(np.ones(parts[2].shape, np.bool_))
    return DenoiseStage(session, runtime_weights(bundle), config, "openpi"), Prefix(*parts)


def continued(config: Pi05Config) -> Overlap:
    """A chunk before, a quarter of which will have been executed; committed where the graph knows that."""
    horizon = config.action_horizon
    committed = (np.arange(horizon) < horizon // 4) & (config.rtc == "trained")
    weights = prefix_weights(horizon // 4, horizon - horizon // 4, horizon)
    actions = np.random.default_rng(1).uniform(-1, 1, (1, horizon, config.action_dim)).astype(np.float32)
    return Overlap(actions, weights[None], committed[None])


def contenders(bundle: Bundle, tokens: int) -> dict[str, Callable[[], object]]:
    """What is timed of one bundle, by name."""
    config = bundle.manifest.config
    stage, prefix = stage_of(bundle, tokens)
    noise = np.zeros((1, config.action_horizon, config.action_dim), np.float32)
    runs: dict[str, Callable[[], object]] = {config.rtc: lambda: stage.run(prefix, noise, STEPS, {})}
    if config.rtc != "none":
        overlap = continued(config)
        runs[f"{config.rtc}, continuing"] = lambda: stage.run(prefix, noise, STEPS, {}, overlap)
    return runs


def measure(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of processor time a step of every run, all of them in every round, each time in another order."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for run in runs.values():
        run()
    for at in range(rounds):
        for name in order[at % len(order) :] + order[: at % len(order)]:
            start = time.thread_time()
            runs[name]()
            found[name].append(1e3 * (time.thread_time() - start) / STEPS)
    return found


def compare(checkpoint: Path | None, depth: int, rounds: int, tokens: int) -> int:
    with TemporaryDirectory() as made:
        folder = checkpoint
        if folder is None:
            folder = Path(made) / "checkpoint"
            write_expert(folder, depth)
        runs: dict[str, Callable[[], object]] = {}
        for way in WAYS:
            options = Asked(model_only=True, verify=False, fast_head=False, way=way)
            runs |= contenders(export(folder, Path(made) / way, options), tokens)
        found = measure(runs, rounds)
    ratios = {
        name: [one / plain for one, plain in zip(times, found["none"], strict=True)] for name, times in found.items()
    }
    print(f"{'denoise graph':24}{'ms a step, p50':>16}{'ratio, p50':>12}{'p25':>8}{'p75':>8}")
    for name, each in ratios.items():
        low, middle, high = np.quantile(each, [0.25, 0.5, 0.75])
        print(f"{name:24}{statistics.median(found[name]):16.3f}{middle:12.3f}{low:8.3f}{high:8.3f}")
    print(f"{rounds} rounds, one thread, {tokens} prefix tokens")
    return int(max(statistics.median(ratios[name]) for name in ("guided", "guided, continuing")) > MOST)


def main() -> int:
    parser = argparse.ArgumentParser(description="The cost of real-time chunking in the denoise graph.")
    parser.add_argument("checkpoint", type=Path, nargs="?", help="of a π0.5 (default: a random expert of real widths)")
    parser.add_argument("--depth", type=int, default=4, help="layers of the random one (%(default)s)")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=542, help="of the prefix (%(default)s)")
    options = parser.parse_args()
    return run_command(
        "real_time_chunking",
        lambda: compare(options.checkpoint, options.depth, options.rounds, options.tokens),
    )


if __name__ == "__main__":
    sys.exit(main())
