"""What threads of ONNX Runtime cost that spin on when a graph has run: whole inferences, in turn, in one run.

    python benchmarks/spinning.py BUNDLE --rounds 4 --inferences 50

Each graph has threads of its own. As the engine comes they spin for a while after a run, against those of the graph
that runs next; the runtime stops them with the run (`ki_runtime.backends.ort.cpu_options`). Medians; `processor`: the
time that all cores spend on an inference. The bundle is in memory once for each of the three ways.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ki_edge.bundle import Bundle
from ki_edge.commands import run_command, show
from ki_edge.policy.images import model_pictures
from ki_edge.proc import cpu_info
from ki_runtime.backends import ort
from ki_runtime.policy.sampler import Sampler

STOP, SPIN = "session.force_spinning_stop", "session.intra_op.allow_spinning"
WAYS: Mapping[str, Mapping[str, str]] = {
    "as the engine comes": {STOP: "0"},
    "stopped with the run": {},
    "no spinning at all": {SPIN: "0"},
}
CAMERAS, PROMPT, STEPS, REST = 2, 30, 10, 0.3  # REST: seconds after which nothing of another way spins


def open_way(bundle: Bundle, entries: Mapping[str, str], threads: int | None) -> Sampler:
    """A sampler whose sessions have these settings."""
    usual = ort.cpu_options

    def options(*, packed: bool) -> Any:
        engine = usual(packed=packed)
        for key, value in entries.items():
            engine.add_session_config_entry(key, value)
        return engine

    ort.cpu_options = options
    try:
        return Sampler.open(bundle, "ort", threads=threads, say=lambda line: None)
    finally:
        ort.cpu_options = usual


def draw_inputs(bundle: Bundle) -> dict[str, Any]:
    """Arguments of `sample_actions`."""
    config, rng = bundle.manifest.config, np.random.default_rng(0)
    size, cameras = config.vision.image_size, CAMERAS
    return {
        "images": model_pictures(rng.integers(0, 256, (1, cameras, size, size, 3), np.uint8), config.pictures),
        "camera_mask": np.ones((1, cameras), np.bool_),
        "prompt_tokens": rng.integers(3, config.vocab_size, (1, PROMPT)),
        "prompt_mask": np.ones((1, PROMPT), np.bool_),
        "state": np.zeros((1, config.state_size), np.float32) if config.has_state else None,
        "noise": rng.standard_normal((1, config.action_horizon, config.action_dim), np.float32),
        "num_steps": STEPS,
    }


def measure(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of each inference by way: prefix, denoise, total, processor."""
    bundle = Bundle.open(options.bundle)
    ort.onnxruntime().set_default_logger_severity(3)  # it warns of a setting that is set again
    samplers = {way: open_way(bundle, entries, options.threads) for way, entries in WAYS.items()}
    inputs = draw_inputs(bundle)
    found: dict[str, dict[str, list[float]]] = {way: {} for way in WAYS}
    for _ in range(options.rounds):
        for way, sampler in samplers.items():
            time.sleep(REST)
            for count in range(options.inferences + 1):
                spent = time.process_time()
                sampler.sample_actions(**inputs)
                times = {"prefix": sampler.timing.prefix / 1e6, "denoise": sampler.timing.denoise / 1e6}
                times |= {"total": sum(times.values()), "processor": 1e3 * (time.process_time() - spent)}
                for name, value in times.items() if count else ():  # the first one does not count
                    found[way].setdefault(name, []).append(value)
    return found


def main() -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(description="What spinning threads cost.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--inferences", type=int, default=20, help="of each way in each round")
    parser.add_argument("--threads", type=int)
    found = measure(parser.parse_args())
    names = ("prefix", "denoise", "total", "processor")
    rows = (
        f"| {way} | {' | '.join(f'{statistics.median(times[name]):.1f}' for name in names)} |"
        for way, times in found.items()
    )
    head = (f"{cpu_info('model name')}; ms, medians", f"| threads of ONNX Runtime | {' | '.join(names)} |")
    show([*head, "|---|---|---|---|---|", *rows])
    return 0


if __name__ == "__main__":
    sys.exit(run_command("spinning.py", main))
