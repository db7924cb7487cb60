"""OpenVINO alone against ki_runtime on OpenVINO and on ONNX Runtime: one bundle, one run, the same inputs.

    pip install 'ki-edge[openvino]'
    python benchmarks/against_openvino.py BUNDLE --int8 INT8_BUNDLE

"alone" is what a user would write: the bundle's graphs compiled by OpenVINO with its own settings, arrays in, arrays
out. All get the same inputs, already without what is absent: --cameras pictures, a prompt of --prompt tokens. Each
contender runs in a process of its own, one after the other, because it holds the whole model; --rounds goes over all of
them again, medians are over all rounds. bfloat16 is measured where the CPU has it. Exit status 1 if actions leave the
bars of docs/parity.md.
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
from ki_edge.proc import peak_memory
from ki_runtime.openvino.devices import openvino
from ki_runtime.policy.denoise import runtime_weights
from ki_runtime.policy.rounding import BARS
from ki_runtime.policy.sampler import Sampler

Array = npt.NDArray[Any]
Inference = Callable[[], tuple[float, float, Array]]  # milliseconds of prefix and denoise loop, actions
Options = argparse.Namespace
EXACT = "ki_runtime ort"
ALONE = "OpenVINO alone f32"
CONTENDERS = {  # name -> backend of ki_runtime, or the hint that OpenVINO gets
    ALONE: "f32",
    "ki_runtime openvino": "openvino:CPU:f32",
    EXACT: "ort",
    "OpenVINO alone bf16": "bf16",
    "ki_runtime openvino:bf16": "openvino:CPU:bf16",
    "ki_runtime ort int8": "ort",
}
FLOAT32 = 2e-5  # largest error of an action
INT8 = 1e-2  # 1 - cosine
INFERENCES = 5  # measured in each process, after two to warm up


def open_alone(
    bundle: Bundle, hint: str, inputs: Mapping[str, Array], noise: Array, o: argparse.Namespace
) -> Inference:
    """The graphs compiled by OpenVINO for the CPU with this type of its products, chained through arrays."""
    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": o.threads, "PERFORMANCE_HINT": "LATENCY"}
    core = openvino().Core()

    def open_graph(name: str) -> Callable[[Mapping[str, Array]], list[Array]]:
        request = core.compile_model(str(bundle.graph(name)), "CPU", settings).create_infer_request()
        return lambda feeds: list(request.infer(dict(feeds), share_inputs=True, share_outputs=True).values())

    prefix, denoise = open_graph("prefix"), open_graph("denoise")
    times = flow.denoise_times(o.steps, str(bundle.manifest.sampling["time_convention"]))
    rows = flow.modulation_table(runtime_weights(bundle), times, bundle.manifest.config).astype(np.float32)
    dt = np.asarray(flow.step_size(o.steps), np.float32)
    idle = _idle_inputs(bundle, noise)

    def infer() -> tuple[float, float, Array]:
        start = time.perf_counter()
        keys, values, mask = prefix(inputs)
        middle, x = time.perf_counter(), noise
        for row, moment in zip(rows, times, strict=True):
            step = {"x_t": x, "modulation": row, "dt": dt, "prefix_k": keys, "prefix_v": values, "prefix_mask": mask}
            own = {"time": np.asarray(moment, np.float32)} if "time" in idle else {}
            x = denoise({**idle, **step, **own})[0].copy()
        return 1e3 * (middle - start), 1e3 * (time.perf_counter() - middle), x

    return infer


def open_ours(
    bundle: Bundle, backend: str, inputs: Mapping[str, Array], noise: Array, o: argparse.Namespace
) -> Inference:
    """The bundle as a robot runs it."""
    sampler = Sampler.open(bundle, backend, threads=o.threads, say=lambda line: None)

    def infer() -> tuple[float, float, Array]:
        actions = sampler.sample_actions(*inputs.values(), noise=noise, num_steps=o.steps)
        return 1e-6 * sampler.timing.prefix, 1e-6 * sampler.timing.denoise, actions

    return infer


def _idle_inputs(bundle: Bundle, noise: Array) -> dict[str, Array]:
    """What the denoise graph takes of the chunk before, where there was none."""
    found = {}
    described = bundle.manifest.graphs["denoise"]["inputs"]
    for tensor in described if isinstance(described, list) else described.values():
        if tensor["name"] in ("previous", "previous_weights", "guidance", "time", "committed", "committed_modulation"):
            dims = [1 if isinstance(dim, str) else dim for dim in tensor["dims"]]
            found[tensor["name"]] = np.zeros(dims, tensor["dtype"])
    return found


def draw_inputs(bundle: Bundle, cameras: int, prompt: int) -> tuple[dict[str, Array], Array]:
    """Feeds of the prefix graph, in a sampler's order, and noise f32 [1, H, A]."""
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
    """Milliseconds of each inference by stage, its actions, peak memory, and the seconds that opening took."""
    inputs, noise = draw_inputs(bundle, options.cameras, options.prompt)
    start = time.perf_counter()
    opener = open_alone if contender.startswith("OpenVINO") else open_ours
    infer = opener(bundle, CONTENDERS[contender], inputs, noise, options)
    load_s = time.perf_counter() - start
    found = [infer() for _ in range(2 + options.inferences)]
    stages = {"prefix": [each[0] for each in found[2:]], "denoise": [each[1] for each in found[2:]]}
    peak = (peak_memory() or 0) / 1e6
    return {"load_s": load_s, "peak_mb": peak, "actions": found[-1][2].tolist(), **stages}


def in_a_process(contender: str, arguments: list[str]) -> dict[str, Any]:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, *arguments, "--only", contender]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{contender}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def table(found: Mapping[str, list[dict[str, Any]]]) -> tuple[list[str], bool]:
    """One line a contender, and whether every one is within its bar of ONNX Runtime's float32 actions."""
    exact = np.array(found[EXACT][0]["actions"])
    head = (
        f"{'median, ms':26}{'prefix':>8}{'denoise':>8}{'total':>8}{'ratio':>7}{'best':>8}{'load, s':>8}{'peak, MB':>9}"
    )
    lines, good = [head + "  actions"], True
    base = statistics.median(_totals(found[ALONE]))
    for contender, rounds in found.items():
        stages = (statistics.median(ms for one in rounds for ms in one[stage]) for stage in ("prefix", "denoise"))
        totals = _totals(rounds)
        middle = statistics.median(totals)
        times = "".join(f"{ms:9.1f}" for ms in (*stages, middle))
        load, peak = (min(one[name] for one in rounds) for name in ("load_s", "peak_mb"))
        within, told = _judge(contender, np.array(rounds[0]["actions"]), exact)
        good &= within
        lines.append(f"{contender:26}{times}{middle / base:9.3f}{min(totals):9.1f}{load:9.1f}{peak:9.0f}  {told}")
    return lines, good


def _totals(rounds: list[dict[str, Any]]) -> list[float]:
    return [sum(pair) for one in rounds for pair in zip(one["prefix"], one["denoise"], strict=True)]


def _judge(contender: str, actions: Array, exact: Array) -> tuple[bool, str]:
    error = float(np.abs(actions - exact).max())
    if contender.endswith("int8"):
        cosine = float((actions * exact).sum() / (np.linalg.norm(actions) * np.linalg.norm(exact)))
        within, told = 1 - cosine <= INT8, f"cosine {cosine:.6f} (least {1 - INT8})"
    else:
        bar = BARS["bfloat16"].actions if contender.endswith("bf16") else FLOAT32
        within, told = error <= bar, f"error {error:.1e} (allowed {bar:.0e})"
    return within, told if within else told + " FAILED"


def names(options: argparse.Namespace) -> list[str]:
    """The contenders that can run here."""
    has_bf16 = "BF16" in openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    without = [] if has_bf16 else ["bf16"]
    without += [] if options.int8 is not None else ["int8"]
    return [name for name in CONTENDERS if not name.endswith(tuple(without))]


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="OpenVINO alone against ki_runtime on a bundle's graphs.")
    parser.add_argument("bundle", type=Path, help="exported with --precision fp32")
    parser.add_argument("--int8", type=Path, help="the same checkpoint, exported with --precision int8")
    parser.add_argument("--cameras", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=30, help="tokens")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--inferences", type=int, default=INFERENCES, help="measured in each round")
    parser.add_argument("--only", choices=CONTENDERS, help="measure this one here and print JSON")
    options = parser.parse_args()
    if options.only is not None:
        path = options.int8 if options.only.endswith("int8") else options.bundle
        print(json.dumps(measure(options.only, Bundle.open(path), options)))
        return 0
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names(options)}
    for _ in range(options.rounds):
        for name, rounds in found.items():
            rounds.append(in_a_process(name, sys.argv[1:]))
    lines, good = table(found)
    print("\n".join(lines))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
