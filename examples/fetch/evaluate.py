"""Success of a policy on the simulated Fetch arm, in PyTorch or as an exported bundle, on the same seeds and noise.

    python examples/fetch/evaluate.py examples/fetch/checkpoint --episodes 100 --seed 1000     (a checkpoint folder)
    python examples/fetch/evaluate.py build/fetch/bundle --episodes 100 --seed 1000            (a bundle)
    python examples/fetch/evaluate.py CHECKPOINT BUNDLE ...                                    (side by side)

The seeds of an evaluation are scenes that no training saw. Final success: gripper within 5 cm at the last step.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from together import run_episodes, run_together

from ki_edge.bundle import MANIFEST, Bundle
from ki_edge.errors import KiEdgeError
from ki_runtime.control.options import MODES, LoopOptions


def open_policy(path: Path, backend: str = "") -> Any:
    """A bundle through the runtime; a checkpoint through PyTorch (only then is torch imported).

    A bundle for GPUs (16 bits and less) is computed in exactly its types: ONNX Runtime's CPU would widen them.
    `backend`: let this engine of the runtime's compute a bundle instead.
    """
    if (path / MANIFEST).is_file():
        from ki_runtime.policy.assets import read_assets
        from ki_runtime.policy.policy import Policy

        bundle = Bundle.open(path)
        if not backend and bundle.manifest.precision not in ("float32", "int8"):
            from ki_export.arithmetic.session import arithmetic_sampler

            return Policy(arithmetic_sampler(bundle), read_assets(bundle))
        return Policy.load(bundle, backend=backend or "auto")
    from ki_export.parity.reference import ReferencePolicy

    return ReferencePolicy(path)


def evaluate(path: Path, robot: str, options: LoopOptions, together: int = 1, backend: str = "") -> dict[str, Any]:
    """Run all episodes with one policy; final and any-step success, and where the episodes ended."""
    policy, together = open_policy(path, backend), min(together, options.episodes)
    if together > 1 and hasattr(policy, "sampler"):
        episodes = run_together(policy, robot, options, together)
    else:
        episodes = run_episodes(policy, robot, options)
    success = float(np.mean([bool(episode.success) for episode in episodes]))
    return {
        "policy": path.name,
        "runs": "bundle" if (path / MANIFEST).is_file() else "PyTorch",
        "episodes": len(episodes),
        "success": success,
        "interval": wilson(success, len(episodes)),
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
    parser.add_argument("--backend", default="", help="engine for bundles, as of ki-run: ort, openvino:bf16, ...")
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
        results = [
            evaluate(path, arguments.robot, options, arguments.together, arguments.backend) for path in arguments.policy
        ]
    except KiEdgeError as error:
        print(f"evaluate: error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(results, indent=1))
        return 0
    for row in results:
        final, ever = 100 * row["success"], 100 * row["success_any_step"]
        name = f"{row['runs']:8} {row['policy']:20}"
        low, high = (100 * bound for bound in row["interval"])
        interval = f"(95 %: {low:.1f} to {high:.1f})"
        print(f"{name} final {final:5.1f} % {interval}   at any step {ever:5.1f} %   of {row['episodes']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
