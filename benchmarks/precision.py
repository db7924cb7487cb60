"""What 8 bits cost in accuracy: actions of an int8 bundle against those of the float32 bundle of the same checkpoint.

    python benchmarks/precision.py examples/fetch/checkpoint --robot gym:FetchReach-v4 --seeds 36
    python benchmarks/precision.py build/depth4 --seeds 8

Both bundles get the same observations and the same noise, a seed each. With --robot, observations come from the robot,
at the start of one episode a seed and some steps into it; without, they are drawn: coloured blocks, a random prompt.
Errors are in the model's space, over the dimensions that the robot has: relative L2 over all seeds, the cosine of the
worst chunk, the largest single difference.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.bundle import Bundle
from ki_export.exporter import export
from ki_export.options import ExportOptions
from ki_export.parity.cases import standard_cases
from ki_runtime.policy.policy import Policy
from ki_runtime.policy.sampler import Sampler
from ki_runtime.robots import open_robot

F32 = npt.NDArray[np.float32]
STEPS_IN = 4  # control steps between the observations of an episode
EACH = 3  # observations of an episode
PRECISIONS = ("fp32", "int8")


def bundles(checkpoint: Path, folder: Path, *, policy: bool) -> dict[str, Bundle]:
    """The two exports of a checkpoint; those that lie in `folder` already are taken as they are."""
    found = {}
    for precision in PRECISIONS:
        path = folder / precision
        options = ExportOptions(precision=precision, model_only=not policy, verify=False)  # type: ignore[arg-type]
        found[precision] = Bundle.open(path) if path.exists() else export(checkpoint, path, options)
    return found


def drawn_actions(found: dict[str, Bundle], seeds: int) -> Iterator[tuple[F32, F32]]:
    """Actions f32 [B, H, A] of both bundles for observations of random pixels and tokens."""
    exact, rounded = (Sampler.open(found[precision]) for precision in PRECISIONS)
    plan: dict[str, Any] = {"cameras": 2, "max_prompt": 30, "num_steps": exact.num_steps, "forced": ()}
    case = standard_cases(exact.config, **plan)[0]
    rng = np.random.default_rng(0)
    for seed in range(seeds):
        images = rng.permutation(case.images.reshape(-1)).reshape(case.images.shape) if seed else case.images
        tokens = rng.integers(2, exact.config.vocab_size, case.prompt_tokens.shape)
        inputs = (images, case.camera_mask, tokens, case.prompt_mask)
        state = {} if case.state is None else {"state": case.state}
        yield tuple(sampler.sample_actions(*inputs, seed=seed, **state) for sampler in (exact, rounded))  # type: ignore[misc]


def robot_actions(found: dict[str, Bundle], robot: str, seeds: int) -> Iterator[tuple[F32, F32]]:
    """As the model gives them, f32 [1, H, a], for what the robot sees while the float32 bundle controls it."""
    exact, rounded = (Policy.load(found[precision]) for precision in PRECISIONS)
    heard = [listen(policy) for policy in (exact, rounded)]
    arm = open_robot(robot)
    try:
        for seed in range(seeds):
            if seed % EACH == 0:
                arm.reset(seed)
            observation = arm.observe()
            actions = exact.infer(observation, seed=seed)["actions"]
            rounded.infer(observation, seed=seed)
            yield heard[0][-1], heard[1][-1]
            for action in actions[:STEPS_IN]:
                arm.act(action.astype(np.float32))
    finally:
        arm.close()


def listen(policy: Policy) -> list[F32]:
    """A list that will hold what the policy's model returns: a robot's set-points hide small motions in positions."""
    heard: list[F32] = []
    sample, dims = policy.sampler.sample_actions, policy.contract.action_dim

    def sample_and_keep(*inputs: Any, **options: Any) -> F32:
        actions = sample(*inputs, **options)
        heard.append(actions[..., :dims].copy())
        return actions

    policy.sampler.sample_actions = sample_and_keep  # type: ignore[method-assign]
    return heard


def errors(pairs: list[tuple[F32, F32]]) -> dict[str, float]:
    """Relative L2, smallest cosine of a chunk, largest difference and the largest action."""
    exact, rounded = (np.stack(side).reshape(len(pairs), -1).astype(np.float64) for side in zip(*pairs, strict=True))
    cosines = (exact * rounded).sum(1) / (np.linalg.norm(exact, axis=1) * np.linalg.norm(rounded, axis=1))
    return {
        "relative L2": float(np.linalg.norm(rounded - exact) / np.linalg.norm(exact)),
        "smallest cosine": float(cosines.min()),
        "max abs": float(np.abs(rounded - exact).max()),
        "largest action": float(np.abs(exact).max()),
    }


def main() -> int:
    """Parse, export if need be, compare, print."""
    parser = argparse.ArgumentParser(description="Action error of int8 against float32.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--folder", type=Path, help="keep the exports here, or take them from here (fp32/, int8/)")
    parser.add_argument("--seeds", type=int, default=8, help="observations, each with its own noise (%(default)s)")
    parser.add_argument("--robot", help="take observations from this robot, for example gym:FetchReach-v4")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = bundles(options.checkpoint, options.folder or Path(scratch), policy=options.robot is not None)
        if options.robot is None:
            pairs = list(drawn_actions(found, options.seeds))
        else:
            pairs = list(robot_actions(found, options.robot, options.seeds))
    print(f"{len(pairs)} observations: " + ", ".join(f"{name} {value:.6g}" for name, value in errors(pairs).items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
