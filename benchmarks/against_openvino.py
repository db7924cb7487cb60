"""A bundle's float32 graphs in OpenVINO, in float32 and bfloat16, against ONNX Runtime: one inference end to end.

    pip install openvino
    python benchmarks/against_openvino.py BUNDLE --int8 INT8_BUNDLE

The decision that rests on it is in docs/precision.md. Both engines get the same inputs, already without what is
absent: --cameras pictures, a prompt of --prompt tokens. Each contender runs in a process of its own, one after the
other, because it holds the whole model; --rounds goes over all of them again, and medians are over all rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge import flow
from ki_edge.bundle import Bundle
from ki_edge.policy.images import model_pictures
from ki_runtime.policy.denoise import runtime_weights

Array = npt.NDArray[Any]
Graph = Callable[[Mapping[str, Array]], list[Array]]
CONTENDERS = ("openvino f32", "openvino bf16", "onnxruntime float32", "onnxruntime int8")
INFERENCES = 5  # measured in each process, after two to warm up


def open_openvino(path: Path, hint: str, threads: int) -> Graph:
    """A graph compiled for the CPU with this type of its matrix products."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()

    def run(feeds: Mapping[str, Array]) -> list[Array]:
        return list(request.infer(dict(feeds), share_inputs=True, share_outputs=True).values())

    return run


def open_onnxruntime(bundle: Bundle, name: str, threads: int) -> Graph:
    """A graph as ki_runtime opens it."""
    from ki_edge import graphs
    from ki_runtime.backends.registry import SessionOptions, choose_backend, open_session

    spec = {spec.name: spec for spec in graphs.specs(bundle.manifest.config, fast=True)}[name]
    session = open_session(bundle, spec, choose_backend("ort"), SessionOptions(threads))
    return lambda feeds: list(session.run(feeds).values())


def draw_inputs(bundle: Bundle, cameras: int, prompt: int) -> tuple[dict[str, Array], Array]:
    """Feeds of the prefix graph, and noise f32 [1, H, A]."""
    config, rng = bundle.manifest.config, np.random.default_rng(0)
    size = config.vision.image_size
    feeds = {
        "images": model_pictures(rng.integers(0, 256, (1, cameras, size, size, 3), np.uint8), config.pictures),
        "camera_mask": np.ones((1, cameras), np.bool_),
        "prompt_tokens": rng.integers(3, config.vocab_size, (1, prompt)).astype(np.int32),
        "prompt_mask": np.ones((1, prompt), np.bool_),
    }
    return feeds, rng.standard_normal((1, config.action_horizon, config.action_dim), np.float32)


def measure(contender: str, bundle: Bundle, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of each inference by stage, its actions, and the seconds that opening took."""
    engine, kind = contender.split()
    start = time.perf_counter()
    prefix, denoise = (
        open_openvino(bundle.graph(name), kind, options.threads)
        if engine == "openvino"
        else open_onnxruntime(bundle, name, options.threads)
        for name in ("prefix", "denoise")
    )
    load_s = time.perf_counter() - start
    feeds, noise = draw_inputs(bundle, options.cameras, options.prompt)
    times = flow.denoise_times(options.steps, str(bundle.manifest.sampling["time_convention"]))
    rows = flow.modulation_table(runtime_weights(bundle), times, bundle.manifest.config)
    dt = np.asarray(flow.step_size(options.steps), np.float32)
    stages: dict[str, list[float]] = {"prefix": [], "denoise": []}
    for _ in range(2 + INFERENCES):
        start = time.perf_counter()
        keys, values, mask = prefix(feeds)
        middle = time.perf_counter()
        x = noise
        for row in rows.astype(np.float32):
            step = {"x_t": x, "modulation": row, "dt": dt, "prefix_k": keys, "prefix_v": values, "prefix_mask": mask}
            x = denoise(step)[0].copy()
        stages["prefix"].append(1e3 * (middle - start))
        stages["denoise"].append(1e3 * (time.perf_counter() - middle))
    return {"load_s": load_s, "actions": x.tolist(), **{name: times[2:] for name, times in stages.items()}}


def in_a_process(contender: str, arguments: list[str]) -> dict[str, Any]:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, *arguments, "--only", contender]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def table(found: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """One line a contender, differences to ONNX Runtime's float32."""
    exact = np.array(found["onnxruntime float32"][0]["actions"])
    lines = [f"{'p50, ms':22}{'prefix':>9}{'denoise':>9}{'total':>9}{'best':>9}{'load, s':>9}{'rel. L2':>10}"]
    for contender, rounds in found.items():
        prefix, denoise = ([ms for one in rounds for ms in one[stage]] for stage in ("prefix", "denoise"))
        totals = [sum(pair) for pair in zip(prefix, denoise, strict=True)]
        error = np.linalg.norm(np.array(rounds[0]["actions"]) - exact) / np.linalg.norm(exact)
        middle = (statistics.median(values) for values in (prefix, denoise, totals))
        cells = "".join(f"{value:9.0f}" for value in (*middle, min(totals)))
        lines.append(f"{contender:22}{cells}{rounds[0]['load_s']:9.1f}{error:10.1e}")
    return lines


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="OpenVINO against ONNX Runtime on a bundle's graphs.")
    parser.add_argument("bundle", type=Path, help="exported with --precision fp32")
    parser.add_argument("--int8", type=Path, help="the same checkpoint, exported with --precision int8")
    parser.add_argument("--cameras", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=30, help="tokens")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=CONTENDERS, help="measure this one here and print JSON")
    options = parser.parse_args()
    if options.only is not None:
        path = options.int8 if options.only.endswith("int8") else options.bundle
        print(json.dumps(measure(options.only, Bundle.open(path), options)))
        return 0
    names = [name for name in CONTENDERS if options.int8 is not None or not name.endswith("int8")]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            found[name].append(in_a_process(name, sys.argv[1:]))
    print("\n".join(table(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
