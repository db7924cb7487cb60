"""The exported runtime against PyTorch: the same inputs, the same weights, one process, measured in turn.

    python benchmarks/random_checkpoint.py build/depth2 --depth 2
    python benchmarks/sampler.py build/depth2

Two of three cameras are present, the prompt has 30 tokens, 10 denoising steps. Contenders run in float32 on the CPU,
with the same number of threads:

    openpi     PyTorch as openpi runs it: the absent camera is a black picture with its mask off, the prompt is padded
               to 200 tokens, the last backbone layer runs to its end although nothing uses more than its K/V, and every
               step computes its own time modulation; K/V are computed once
    no tail    the same without the end of the last layer, whose share is large in a model of few layers
    trimmed    PyTorch on the runtime's terms: only tokens that exist, modulations computed beforehand
    bundle     ki_runtime.Sampler on ONNX Runtime, which computes what `trimmed` does

So openpi / trimmed is what not computing is worth, and trimmed / bundle what the engine is worth. GFLOP counts matrix
products. A fresh process without torch runs the bundle once and tells its memory. Exit status 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders import Contender, Inputs, Run, TorchSide, bundle_contender, count_gflop
from machine import OtherLoad, cores, describe, print_machine, print_table
from memory import limit, print_memory, process_memory

from ki_edge.bundle import Bundle
from ki_edge.config import Pi05Config
from ki_edge.model import Checkpoint
from ki_export.exporter import ExportOptions, export
from ki_runtime.prefix import prepare_inputs
from ki_runtime.sampler import Sampler

CAMERAS, PRESENT, PADDED, TOKENS, STEPS = 3, 2, 200, 30, 10
SPEEDUP = 3.0  # openpi / bundle, total
DIFFERENCE = 2e-5  # max abs of the actions: the float32 bar of the export
PAUSE_S = 0.1  # before each measurement: the other engine's threads stop spinning


def draw_inputs(config: Pi05Config) -> Inputs:
    """images [1,3,h,w,3], camera_mask [1,3], prompt_tokens [1,200], prompt_mask [1,200]; what is absent is zeros."""
    rng = np.random.default_rng(0)
    size = config.vision.image_size
    mask = np.arange(CAMERAS)[None] < PRESENT
    images = rng.integers(0, 256, (1, CAMERAS, size, size, 3), np.uint8) * mask[:, :, None, None, None]
    prompt_mask = np.arange(PADDED)[None] < TOKENS
    tokens = rng.integers(3, config.vocab_size, (1, PADDED)) * prompt_mask
    return images.astype(np.uint8), mask, tokens.astype(np.int32), prompt_mask


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


def speed_up(runs: list[Run], bundle: list[Run]) -> dict[str, float]:
    """How many times faster the bundle is: of the medians, and the extremes of single rounds."""
    each = [a.total_ms / b.total_ms for a, b in zip(runs, bundle, strict=True)]
    p50 = medians(runs)["total_ms"] / medians(bundle)["total_ms"]
    return {"p50": p50, "min": min(each), "max": max(each)}


def compare(checkpoint: Path, bundle: Bundle, threads: int, rounds: int) -> dict[str, Any]:
    """Everything that is reported."""
    memory = process_memory(bundle, threads, cameras=PRESENT, tokens=TOKENS)
    torch.set_num_threads(threads)
    model = Checkpoint.open(checkpoint).load_model()
    sampler = Sampler.open(bundle, "ort", threads=threads)
    config = sampler.config
    inputs = draw_inputs(config)
    noise = np.random.default_rng(1).standard_normal((1, config.action_horizon, config.action_dim), np.float32)
    side = TorchSide(model, noise, str(bundle.manifest.sampling["time_convention"]), STEPS)
    kept = prepare_inputs(*inputs, config)
    trimmed = (kept.images, kept.camera_mask, kept.prompt_tokens, kept.prompt_mask)
    contenders = {
        "openpi": side.contender(inputs, tail=True, hoisted=False),
        "no tail": side.contender(inputs, tail=False, hoisted=False),
        "trimmed": side.contender(trimmed, tail=False, hoisted=True),
    }
    gflop = {name: count_gflop(run) for name, run in contenders.items()}
    contenders["bundle"] = bundle_contender(sampler, inputs, noise, STEPS)
    gflop["bundle"] = gflop["trimmed"]
    with OtherLoad() as others:
        runs = measure(contenders, rounds)
    stages = {name: medians(found) for name, found in runs.items()}
    return {
        "machine": describe(),
        "threads": threads,
        "rounds": rounds,
        "other_load": others.share,
        "model": {"layers": config.backbone.depth, "width": config.backbone.width, "horizon": config.action_horizon},
        "tokens": {"openpi": CAMERAS * config.vision.patches + PADDED, "bundle": len(kept.columns)},
        "gflop": gflop,
        "p50": stages,
        "speed_up": {name: speed_up(found, runs["bundle"]) for name, found in runs.items() if name != "bundle"},
        "max_abs_difference": float(np.abs(runs["openpi"][-1].actions - runs["bundle"][-1].actions).max()),
        "memory": memory,
    }


def missed_bars(report: Mapping[str, Any]) -> list[str]:
    """What is not as good as it must be."""
    memory = report["memory"]
    bars = {
        f"speed-up at least {SPEEDUP:.0f}x": report["speed_up"]["openpi"]["p50"] >= SPEEDUP,
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
    rows = []
    for name, stages in report["p50"].items():
        times = [f"{stages[stage]:.1f}" for stage in ("prefix_ms", "denoise_ms", "total_ms")]
        gflop = report["gflop"][name]
        cells = [*times, f"{gflop:.0f}", f"{1e3 * gflop / stages['total_ms']:.0f}"]
        x = report["speed_up"].get(name)
        rows.append(
            (
                name,
                *cells,
                "" if x is None else f"{x['p50']:.2f}x",
                "" if x is None else f"{x['min']:.2f} to {x['max']:.2f}",
            )
        )
    print_table(
        ("p50, ms", "prefix", "denoise", "total", "GFLOP", "GFLOP/s", "bundle is faster", "in single rounds"), rows
    )
    print(f"\nother processes used {100 * report['other_load']:.0f} % of the CPU meanwhile")
    print(f"max |difference| of the actions: {report['max_abs_difference']:.2e}\n")
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
