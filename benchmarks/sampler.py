"""The exported runtime against PyTorch: the same inputs, the same weights, one process, measured in turn.

    python benchmarks/random_checkpoint.py /tmp/depth2 --depth 2
    python benchmarks/sampler.py /tmp/depth2

Two of three cameras are present, the prompt has 30 tokens, 10 denoising steps. Three contenders, all in float32 on the
CPU with the same number of threads:

    openpi     PyTorch as openpi runs it: the absent camera is a black picture with its mask off, the prompt is padded
               to 200 tokens, every step computes its own time modulation; K/V are computed once
    trimmed    PyTorch on the runtime's terms: only tokens that exist, modulations computed beforehand
    bundle     ki_runtime.Sampler on ONNX Runtime

openpi / trimmed is what not computing is worth, trimmed / bundle what the engine is worth. openpi also runs the last
backbone layer's attention and MLP, which nothing uses; here no contender does, since with few layers that would flatter
the ratio. A fresh process without torch runs the bundle once and tells its memory. Exit status 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from machine import cores, describe, print_machine, print_table
from memory import limit, print_memory, process_memory

from ki_edge.bundle import Bundle
from ki_edge.config import Pi05Config
from ki_edge.flow import denoise_times, step_size
from ki_edge.model import Checkpoint, Pi05
from ki_export.exporter import ExportOptions, export
from ki_runtime.prefix import prepare_inputs
from ki_runtime.sampler import Sampler

F32 = npt.NDArray[np.float32]
Array = npt.NDArray[Any]
Inputs = tuple[Array, Array, Array, Array]  # of the prefix graph, in its order
CAMERAS, PRESENT, PADDED, TOKENS, STEPS = 3, 2, 200, 30, 10
SPEEDUP = 3.0  # openpi / bundle, total
DIFFERENCE = 2e-5  # max abs of the actions: the float32 bar of the export
PAUSE_S = 0.1  # before each measurement: the other engine's threads stop spinning


@dataclass(frozen=True)
class Run:
    """One inference: actions f32 [1,H,A], milliseconds of its two stages."""

    actions: F32
    prefix_ms: float
    denoise_ms: float

    @property
    def total_ms(self) -> float:
        return self.prefix_ms + self.denoise_ms


Contender = Callable[[], Run]


def draw_inputs(config: Pi05Config) -> Inputs:
    """images [1,3,h,w,3], camera_mask [1,3], prompt_tokens [1,200], prompt_mask [1,200]; what is absent is zeros."""
    rng = np.random.default_rng(0)
    size = config.vision.image_size
    mask = np.arange(CAMERAS)[None] < PRESENT
    images = rng.integers(0, 256, (1, CAMERAS, size, size, 3), np.uint8) * mask[:, :, None, None, None]
    prompt_mask = np.arange(PADDED)[None] < TOKENS
    tokens = rng.integers(3, config.vocab_size, (1, PADDED)) * prompt_mask
    return images.astype(np.uint8), mask, tokens.astype(np.int32), prompt_mask


class TorchSide:
    """The PyTorch model, run either way."""

    def __init__(self, model: Pi05, convention: str) -> None:
        self._model = model
        self._times = torch.from_numpy(denoise_times(STEPS, convention))
        self._dt = torch.tensor(step_size(STEPS))
        with torch.inference_mode():
            self._rows = list(model.modulation(self._times))

    def contender(self, inputs: Inputs, noise: F32, *, hoisted: bool) -> Contender:
        """`hoisted`: modulations were computed beforehand; else each step computes its own."""
        tensors, x_1 = [torch.from_numpy(np.ascontiguousarray(array)) for array in inputs], torch.from_numpy(noise)

        @torch.inference_mode()
        def run() -> Run:
            start = time.perf_counter()
            prefix = self._model.prefix_forward(*tensors)
            middle = time.perf_counter()
            x = x_1
            for step in range(STEPS):
                row = self._rows[step] if hoisted else self._model.modulation(self._times[step : step + 1])[0]
                x = self._model.denoise_step(x, row, self._dt, *prefix)
            end = time.perf_counter()
            return Run(x.numpy(), 1e3 * (middle - start), 1e3 * (end - middle))

        return run


def bundle_contender(sampler: Sampler, inputs: Inputs, noise: F32) -> Contender:
    """The runtime on the untrimmed inputs; trimming is part of what is measured, in the prefix."""

    def run() -> Run:
        start = time.perf_counter()
        actions = sampler.sample_actions(*inputs, noise=noise, num_steps=STEPS)
        total, denoise = 1e3 * (time.perf_counter() - start), sampler.timing.denoise / 1e6
        return Run(actions, total - denoise, denoise)

    return run


def measure(contenders: Mapping[str, Contender], rounds: int) -> dict[str, list[Run]]:
    """One warm-up each, then `rounds` times all of them in turn."""
    for run in contenders.values():
        run()
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            time.sleep(PAUSE_S)
            runs[name].append(run())
    return runs


def medians(runs: list[Run]) -> dict[str, float]:
    """p50 in milliseconds by stage."""
    return {
        name: float(np.median([getattr(r, name) for r in runs])) for name in ("prefix_ms", "denoise_ms", "total_ms")
    }


def compare(checkpoint: Path, bundle: Bundle, threads: int, rounds: int) -> dict[str, Any]:
    """Everything that is reported."""
    memory = process_memory(bundle, threads, cameras=PRESENT, tokens=TOKENS)
    torch.set_num_threads(threads)
    model = Checkpoint.open(checkpoint).load_model()
    sampler = Sampler.open(bundle, "ort", threads=threads)
    config = sampler.config
    inputs = draw_inputs(config)
    noise = np.random.default_rng(1).standard_normal((1, config.action_horizon, config.action_dim), np.float32)
    side = TorchSide(model, str(bundle.manifest.sampling["time_convention"]))
    kept = prepare_inputs(*inputs, config)
    trimmed = (kept.images, kept.camera_mask, kept.prompt_tokens, kept.prompt_mask)
    contenders = {
        "openpi": side.contender(inputs, noise, hoisted=False),
        "trimmed": side.contender(trimmed, noise, hoisted=True),
        "bundle": bundle_contender(sampler, inputs, noise),
    }
    runs = measure(contenders, rounds)
    each = [a.total_ms / b.total_ms for a, b in zip(runs["openpi"], runs["bundle"], strict=True)]
    stages = {name: medians(found) for name, found in runs.items()}
    return {
        "machine": describe(),
        "threads": threads,
        "rounds": rounds,
        "model": {"layers": config.backbone.depth, "width": config.backbone.width, "horizon": config.action_horizon},
        "tokens": {"openpi": CAMERAS * config.vision.patches + PADDED, "bundle": len(kept.columns)},
        "p50": stages,
        "ratio": stages["openpi"]["total_ms"] / stages["bundle"]["total_ms"],
        "ratio_of_rounds": [min(each), max(each)],
        "max_abs_difference": float(np.abs(runs["openpi"][-1].actions - runs["bundle"][-1].actions).max()),
        "memory": memory,
    }


def missed_bars(report: Mapping[str, Any]) -> list[str]:
    """What is not as good as it must be."""
    memory = report["memory"]
    bars = {
        f"speed-up at least {SPEEDUP:.0f}x": report["ratio"] >= SPEEDUP,
        f"difference at most {DIFFERENCE:.0e}": report["max_abs_difference"] <= DIFFERENCE,
        f"peak memory at most {limit(memory) / 1e6:.0f} MB": memory["rss_peak"] <= limit(memory),
    }
    return [name for name, held in bars.items() if not held]


def print_report(report: Mapping[str, Any]) -> None:
    """For people."""
    print_machine()
    tokens, model = report["tokens"], report["model"]
    print(
        f"{model['layers']} layers of width {model['width']}, horizon {model['horizon']}, {STEPS} steps, "
        f"{report['threads']} threads, {report['rounds']} rounds; prefix tokens: openpi {tokens['openpi']}, "
        f"trimmed and bundle {tokens['bundle']}\n"
    )
    base = report["p50"]["bundle"]
    rows = []
    for name, stages in report["p50"].items():
        times = [f"{stages[stage]:.1f}" for stage in ("prefix_ms", "denoise_ms", "total_ms")]
        rows.append((name, *times, f"{stages['total_ms'] / base['total_ms']:.2f}x"))
    print_table(("p50, ms", "prefix", "denoise", "total", "of bundle"), rows)
    low, high = report["ratio_of_rounds"]
    print(f"\nspeed-up over openpi's way    {report['ratio']:.2f}x (single rounds {low:.2f} to {high:.2f})")
    print(f"max |difference| of actions   {report['max_abs_difference']:.2e}\n")
    print_memory(report["memory"])
    missed = missed_bars(report)
    print("\n" + (f"MISSED: {'; '.join(missed)}" if missed else "all bars held"))


def main() -> int:
    """Parse, export if need be, measure, print."""
    parser = argparse.ArgumentParser(description="The exported runtime against PyTorch on the CPU.")
    parser.add_argument("checkpoint", type=Path, help="checkpoint folder, for example of random_checkpoint.py")
    parser.add_argument("--bundle", type=Path, help="its export; made if it does not exist (CHECKPOINT-bundle)")
    parser.add_argument("--threads", type=int, default=cores(), help="CPU threads of both sides (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each contender (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    path = options.bundle or options.checkpoint.with_name(options.checkpoint.name + "-bundle")
    if path.exists():
        bundle = Bundle.open(path)
    else:
        bundle = export(options.checkpoint, path, ExportOptions(model_only=True, verify=False))
    report = compare(options.checkpoint, bundle, options.threads, options.rounds)
    if options.json:
        print(json.dumps({**report, "missed_bars": missed_bars(report)}, indent=1))
    else:
        print_report(report)
    return 1 if missed_bars(report) else 0


if __name__ == "__main__":
    sys.exit(main())
