"""Success of a policy on the simulated Fetch arm, in PyTorch or as an exported bundle, on the same seeds and noise.

    python examples/fetch/evaluate.py examples/fetch/checkpoint --episodes 100 --seed 1000     (a checkpoint folder)
    python examples/fetch/evaluate.py build/fetch/bundle --episodes 100 --seed 1000            (a bundle)
    python examples/fetch/evaluate.py CHECKPOINT BUNDLE ...                                    (side by side)

The seeds of an evaluation are scenes that no training saw. Final success: gripper within 5 cm at the last step.
"""

import argparse
import json
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ki_edge.bundle import MANIFEST, Bundle
from ki_edge.errors import KiEdgeError
from ki_runtime.control.loop import ControlLoop
from ki_runtime.control.options import MODES, LoopOptions
from ki_runtime.robots import open_robot


def open_policy(path: Path) -> Any:
    """A bundle through the runtime; a checkpoint through PyTorch (only then is torch imported).

    A bundle for GPUs (16 bits and less) is computed in exactly its types: ONNX Runtime's CPU would widen them.
    """
    if (path / MANIFEST).is_file():
        from ki_runtime.policy.assets import read_assets
        from ki_runtime.policy.policy import Policy

        bundle = Bundle.open(path)
        if bundle.manifest.precision not in ("float32", "int8"):
            from ki_export.arithmetic.session import arithmetic_sampler

            return Policy(arithmetic_sampler(bundle), read_assets(bundle))
        return Policy.load(bundle)
    from ki_export.parity.reference import ReferencePolicy

    return ReferencePolicy(path)


class Together:
    """Takes the place of a sampler's `sample_actions` for several threads: what all of them ask for is one batch.

    A batch is computed when every thread that has not `left` is waiting. Shorter prompts are padded, which changes no
    action but by rounding.
    """

    def __init__(self, sample: Callable[..., Any], threads: int) -> None:
        self._sample, self._active = sample, threads
        self._turn = threading.Condition()
        self._asked: list[tuple[tuple[Any, ...], dict[str, Any], list[Any]]] = []

    def __call__(self, *inputs: Any, **given: Any) -> Any:
        answer: list[Any] = []
        with self._turn:
            self._asked.append((inputs, given, answer))
            self._compute()
            self._turn.wait_for(lambda: answer)
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

    def leave(self) -> None:
        """A thread asks no more."""
        with self._turn:
            self._active -= 1
            self._compute()

    def _compute(self) -> None:
        if not self._asked or len(self._asked) < self._active:
            return
        asked, self._asked = self._asked, []
        width = max(inputs[2].shape[1] for inputs, _, _ in asked)
        rows = [(*inputs[:2], *(_padded(array, width) for array in inputs[2:])) for inputs, _, _ in asked]
        noise = np.concatenate([given["noise"] for _, given, _ in asked])
        try:
            batch = [np.concatenate(arrays) for arrays in zip(*rows, strict=True)]
            found = self._sample(*batch, noise=noise, num_steps=asked[0][1].get("num_steps"))
            answers: list[Any] = [found[at : at + 1] for at in range(len(asked))]
        except Exception as error:
            answers = [error] * len(asked)
        for (_, _, answer), actions in zip(asked, answers, strict=True):
            answer.append(actions)
        self._turn.notify_all()


def _padded(array: Any, width: int) -> Any:
    return np.pad(array, ((0, 0), (0, width - array.shape[1])))


def run_episodes(policy: Any, robot: str, options: LoopOptions) -> list[Any]:
    """The episodes of a loop, each with the success at its last and at any step."""
    arm = open_robot(robot)
    try:
        return list(ControlLoop(policy, arm, options).run().episodes)
    finally:
        arm.close()


def run_together(policy: Any, robot: str, options: LoopOptions, threads: int) -> list[Any]:
    """The same with `threads` robots at the same time, whose inferences are computed together."""
    together = Together(policy.sampler.sample_actions, threads)
    policy.sampler.sample_actions = together
    bounds = np.linspace(0, options.episodes, threads + 1).astype(int).tolist()

    def run(first: int, last: int) -> list[Any]:
        try:
            mine = replace(options, episodes=last - first, seed=options.seed + first)
            return run_episodes(policy, robot, mine)
        finally:
            together.leave()

    with ThreadPoolExecutor(threads) as pool:
        return [episode for found in pool.map(run, bounds[:-1], bounds[1:]) for episode in found]


def evaluate(path: Path, robot: str, options: LoopOptions, together: int = 1) -> dict[str, Any]:
    """Run all episodes with one policy; final and any-step success, and where the episodes ended."""
    policy, together = open_policy(path), min(together, options.episodes)
    if together > 1 and hasattr(policy, "sampler"):
        episodes = run_together(policy, robot, options, together)
    else:
        episodes = run_episodes(policy, robot, options)
    return {
        "policy": path.name,
        "runs": "bundle" if (path / MANIFEST).is_file() else "PyTorch",
        "episodes": len(episodes),
        "success": float(np.mean([bool(episode.success) for episode in episodes])),
        "success_any_step": float(np.mean([bool(episode.success_any) for episode in episodes])),
        "failed_seeds": [episode.seed for episode in episodes if not episode.success],
    }


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a success rate of which `count` episodes were seen."""
    z = 1.959964
    middle, spread = share + z * z / (2 * count), z * (share * (1 - share) / count + z * z / (4 * count**2)) ** 0.5
    return max(0.0, (middle - spread) / (1 + z * z / count)), min(1.0, (middle + spread) / (1 + z * z / count))


def main() -> int:
    """Parse, evaluate each policy, print a table (or JSON)."""
    parser = argparse.ArgumentParser(description="Success rate of checkpoints and bundles on the simulated Fetch arm.")
    parser.add_argument("policy", type=Path, nargs="+", help="checkpoint folder or bundle")
    parser.add_argument("--robot", default="gym:FetchReach-v4")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1000, help="scene of the first episode; then one up each")
    parser.add_argument("--execute", type=int, default=None, help="actions of a chunk before the next inference")
    parser.add_argument("--mode", choices=MODES, default="sync", help="how the loop waits for the policy")
    parser.add_argument("--delay", type=int, metavar="N", help="an inference takes N actions, on a simulated clock")
    parser.add_argument(
        "--together", type=int, default=1, metavar="N", help="bundles: N robots at the same time, inferences in batches"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    options = LoopOptions(
        episodes=arguments.episodes,
        seed=arguments.seed,
        execute=arguments.execute,
        mode=arguments.mode,
        delay=arguments.delay,
        paced=False,
        close_robot=False,
    )
    try:
        results = [evaluate(path, arguments.robot, options, arguments.together) for path in arguments.policy]
    except KiEdgeError as error:
        print(f"evaluate: error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(results, indent=1))
        return 0
    for row in results:
        final, ever = 100 * row["success"], 100 * row["success_any_step"]
        name = f"{row['runs']:8} {row['policy']:20}"
        low, high = (100 * bound for bound in wilson(row["success"], row["episodes"]))
        interval = f"(95 %: {low:.1f} to {high:.1f})"
        print(f"{name} final {final:5.1f} % {interval}   at any step {ever:5.1f} %   of {row['episodes']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
