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


def evaluate(path: Path, robot: str, options: LoopOptions) -> dict[str, Any]:
    """Run all episodes with one policy; final and any-step success, and where the episodes ended."""
    arm = open_robot(robot)
    try:
        report = ControlLoop(open_policy(path), arm, options).run()
    finally:
        arm.close()
    return {
        "policy": path.name,
        "runs": "bundle" if (path / MANIFEST).is_file() else "PyTorch",
        "episodes": options.episodes,
        "success": report.success_rate,
        "success_any_step": report.success_rate_any,
        "failed_seeds": [episode.seed for episode in report.episodes if not episode.success],
    }


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
        results = [evaluate(path, arguments.robot, options) for path in arguments.policy]
    except KiEdgeError as error:
        print(f"evaluate: error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(results, indent=1))
        return 0
    for row in results:
        final, ever = 100 * row["success"], 100 * row["success_any_step"]
        name = f"{row['runs']:8} {row['policy']:20}"
        print(f"{name} final {final:5.1f} %   at any step {ever:5.1f} %   of {row['episodes']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
