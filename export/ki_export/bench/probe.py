"""A fresh runtime process: imports ki_runtime, runs a bundle once, and tells what that took, as JSON on stdout.

    python -m ki_export.bench.probe BUNDLE policy [--threads N] [--backend NAME] [--memory]
    python -m ki_export.bench.probe BUNDLE model [--cameras N] [--tokens T] [--steps N] ...

A policy gets one black observation; a model gets N black pictures and a prompt of T tokens. `--memory` also watches the
process while it runs. Only the standard library is imported before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ki_edge.policy.contract import PolicyContract

WATCH_S = 0.002  # between two readings of the anonymous memory


class Watch(threading.Thread):
    """Remembers the largest anonymous memory of this process, in bytes, until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._over = threading.Event()

    def run(self) -> None:
        from ki_edge.proc import STATUS, sizes

        while not self._over.wait(WATCH_S):
            self.peak = max(self.peak, sizes(STATUS).get("RssAnon", 0))

    def stop(self) -> None:
        self._over.set()
        self.join()


def black_observation(contract: PolicyContract, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """An observation with everything that the contract wants: black pictures, a state of zeros, any prompt.

    `size`: height and width of the pictures, None: the model's.
    """
    import numpy as np

    picture = np.zeros((*(size or contract.image_size), 3), np.uint8)
    pictures: dict[str, Any] = {camera.key: picture for camera in contract.cameras if camera.key is not None}
    state, prompt = np.zeros(contract.state_dim), {"prompt": contract.default_prompt or "reach the target"}
    if contract.robot == "libero":
        return {**pictures, "observation/state": state, **prompt}
    if contract.robot == "droid":
        joints = {"observation/joint_position": state[:-1], "observation/gripper_position": state[-1:]}
        return {**pictures, **joints, **prompt}
    return {"images": pictures, "state": state, **prompt}


def run_policy(options: argparse.Namespace) -> tuple[object, float]:
    """Open a bundle and let it act once: what was opened (it must live until its memory was read), and when it was."""
    from ki_runtime import Policy

    policy = Policy.load(options.bundle, options.backend, threads=options.threads, sequential=options.sequential)
    ready = time.perf_counter()
    policy.infer(black_observation(policy.contract), seed=0, num_steps=options.steps)
    return policy, ready


def run_model(options: argparse.Namespace) -> tuple[object, float]:
    """The same with the model alone."""
    import numpy as np

    from ki_edge.policy.images import model_pictures
    from ki_runtime import Sampler

    sampler = Sampler.open(options.bundle, options.backend, threads=options.threads, sequential=options.sequential)
    ready = time.perf_counter()
    config = sampler.config
    black = np.zeros((1, options.cameras, config.vision.image_size, config.vision.image_size, 3), np.uint8)
    images = model_pictures(black, config.pictures)
    present, prompt = np.ones((1, options.cameras), np.bool_), np.ones((1, options.tokens), np.bool_)
    tokens = 5 * prompt.astype(np.int32)
    state = np.zeros((1, config.state_size), np.float32) if config.has_state else None
    sampler.sample_actions(images, present, tokens, prompt, state=state, seed=0, num_steps=options.steps)
    return sampler, ready


RUNS = {"policy": run_policy, "model": run_model}


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description="Run a bundle once in this process and tell what that took.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("what", choices=sorted(RUNS))
    parser.add_argument("--cameras", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--sequential", action="store_true", help="one graph in memory at a time")
    parser.add_argument("--memory", action="store_true", help="watch the memory (disturbs the times)")
    options = parser.parse_args()
    watch = Watch()
    if options.memory:
        watch.start()
    start = time.perf_counter()
    import ki_runtime  # noqa: F401

    package = time.perf_counter()
    from ki_runtime import Policy  # noqa: F401

    classes = time.perf_counter()
    alive, ready = RUNS[options.what](options)
    first = time.perf_counter()
    report: dict[str, Any] = {
        "import_s": package - start,
        "import_policy_s": classes - start,
        "load_s": ready - classes,
        "first_action_s": first - start,
        "ran": type(alive).__name__,
        "torch_loaded": "torch" in sys.modules,
    }
    if options.memory:
        watch.stop()
        report["memory"] = _memory(watch.peak)
    sys.stdout.write(json.dumps(report) + "\n")


def _memory(anonymous_peak: int) -> dict[str, int]:
    from ki_edge.proc import STATUS, sizes

    found = sizes(STATUS)
    if not {"VmHWM", "VmRSS"} <= found.keys():
        raise SystemExit(f"{STATUS} has no VmHWM: this kernel does not tell the memory of a process")
    anonymous = sizes("/proc/self/smaps_rollup")["Anonymous"]
    return {
        "rss_peak": found["VmHWM"],
        "rss": found["VmRSS"],
        "anonymous_peak": max(anonymous_peak, anonymous),
        "anonymous": anonymous,
    }


if __name__ == "__main__":
    main()
