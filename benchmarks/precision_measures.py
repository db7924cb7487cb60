"""What `benchmarks/precision.py` measures of each export: error, time, success, and the floor on known devices."""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from precision_exports import Contender, acting_bytes, opened

from ki_edge.bundle import Bundle
from ki_edge.errors import BackendError
from ki_export.parity.cases import standard_cases
from ki_export.source.devices import DEVICES, floor_ms, stages
from ki_runtime.policy.policy import Policy
from ki_runtime.robots import open_robot

F32 = npt.NDArray[np.float32]
EVALUATE = Path(__file__).parents[1] / "examples" / "fetch" / "evaluate.py"
STEPS_IN = 4  # control steps between the observations of an episode
EACH = 3  # observations of an episode
TOGETHER = 10  # robots whose inferences are one batch
CAMERAS, PROMPT, STEPS = 2, 30, 10  # of the inference whose floor is told


@dataclass(frozen=True)
class Inputs:
    """Calls of `Sampler.sample_actions`, and how many of the action's dimensions the robot has."""

    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    dims: int


@dataclass(frozen=True)
class Success:
    """A share of episodes, and its 95 % interval (Wilson's)."""

    share: float
    episodes: int
    interval: tuple[float, float]


@dataclass
class Row:
    """What was found of a contender. `missing`: why nothing was."""

    key: str
    precision: str
    engine: str
    bits: float
    capability: tuple[int, int]
    missing: str = ""
    acting: int = 0
    file: int = 0
    seconds: float = 0.0
    ratio: float | None = None
    relative: float = 0.0
    cosine: float = 1.0
    success: Success | None = None
    bundle: Bundle | None = None
    actions: F32 = field(default_factory=lambda: np.zeros(0, np.float32))

    def to_json(self) -> dict[str, Any]:
        """All figures, without the actions."""
        kept = {name: value for name, value in vars(self).items() if name not in ("actions", "bundle", "success")}
        return kept | {"success": None if self.success is None else vars(self.success)}


def drawn_inputs(bundle: Bundle, count: int) -> Inputs:
    """Random pixels and tokens; every other observation lacks its second camera."""
    config = bundle.manifest.config
    plan: dict[str, Any] = {"cameras": CAMERAS, "max_prompt": PROMPT, "num_steps": STEPS, "forced": ()}
    case = standard_cases(config, **plan)[0]
    rng, calls = np.random.default_rng(0), []
    for seed in range(count):
        images = rng.permutation(case.images.reshape(-1)).reshape(case.images.shape) if seed else case.images
        tokens = rng.integers(2, config.vocab_size, case.prompt_tokens.shape)
        mask = np.array(case.camera_mask)
        mask[:, 1:] &= seed % 2 == 0
        state = {} if case.state is None else {"state": case.state}
        calls.append(((images, mask, tokens, case.prompt_mask), {"seed": seed, **state}))
    return Inputs(calls, config.action_dim)


def robot_inputs(bundle: Bundle, robot: str, count: int) -> Inputs:
    """What the robot sees while this bundle controls it, as the model gets it."""
    policy, arm = Policy.load(bundle, backend="ort"), open_robot(robot)
    calls, sample = [], policy.sampler.sample_actions

    def listen(*inputs: Any, **options: Any) -> F32:
        calls.append((inputs, options))
        return sample(*inputs, **options)

    policy.sampler.sample_actions = listen  # type: ignore[method-assign]
    try:
        for seed in range(count):
            if seed % EACH == 0:
                arm.reset(seed)
            for action in policy.infer(arm.observe(), seed=seed)["actions"][:STEPS_IN]:
                arm.act(action.astype(np.float32))
    finally:
        arm.close()
    return Inputs(calls, policy.contract.action_dim)


def measure(contender: Contender, bundle: Bundle, inputs: Inputs, first: Row | None) -> Row:
    """Open, compute, compare. `first`: the row that it is compared with; None for that one itself."""
    row = Row(contender.key, contender.precision, contender.engine, contender.bits, contender.capability, bundle=bundle)
    row.acting, row.file = acting_bytes(bundle), bundle.weights().path.stat().st_size
    try:
        row.actions, times = _computed(bundle, contender, inputs)
    except BackendError as error:
        row.missing = str(error)
        return row
    row.seconds = statistics.median(times[1:] or times)
    exact = row if first is None else first
    row.ratio = row.seconds / exact.seconds if contender.backend else None
    row.relative, row.cosine = _errors(exact.actions, row.actions)
    return row


def _computed(bundle: Bundle, contender: Contender, inputs: Inputs) -> tuple[F32, list[float]]:
    """Actions f32 [observations, B, H, dims] and the seconds of each call."""
    sampler, actions, times = opened(bundle, contender), [], []
    for given, options in inputs.calls:
        started = time.perf_counter()
        actions.append(sampler.sample_actions(*given, **options)[..., : inputs.dims])
        times.append(time.perf_counter() - started)
    del sampler
    gc.collect()  # before the next model is opened
    return np.stack(actions), times


def _errors(exact: F32, found: F32) -> tuple[float, float]:
    """Relative L2 over all observations, and the smallest cosine of one."""
    one, other = (side.reshape(len(side), -1).astype(np.float64) for side in (exact, found))
    cosines = (one * other).sum(1) / (np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1))
    return float(np.linalg.norm(other - one) / np.linalg.norm(one)), float(cosines.min())


def success(bundle: Path, contender: Contender, robot: str, episodes: int, seed: int) -> Success:
    """Of episodes in a process of their own: the same scenes and noise for each contender."""
    command = [sys.executable, str(EVALUATE), str(bundle), "--robot", robot, "--episodes", str(episodes)]
    command += ["--seed", str(seed), "--together", str(TOGETHER), "--json"]
    command += ["--backend", contender.backend] if contender.backend else []
    (found,) = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    low, high = found["interval"]
    return Success(found["success"], found["episodes"], (low, high))


def describe_success(success: Success) -> str:
    """ "98 of 100 (93 to 99 %)"."""
    low, high = (100 * bound for bound in success.interval)
    return f"{round(success.share * success.episodes)} of {success.episodes} ({low:.0f} to {high:.0f} %)"


def floors(rows: Sequence[Row]) -> Iterator[str]:
    """The least time of an inference on known devices, in ms, for the precisions of GPUs: by counting alone."""
    made = [row for row in rows if row.bits and not row.missing]
    if not made or made[0].bundle is None:
        return
    plan = stages(made[0].bundle.manifest.config, cameras=CAMERAS, prompt=PROMPT, steps=STEPS)
    yield f"Least time on devices, ms ({CAMERAS} cameras, {PROMPT} tokens, {STEPS} steps), by counting, not measured:\n"
    yield f"| | {' | '.join(device.name for device in DEVICES)} |"
    yield "|---" * (len(DEVICES) + 1) + "|"
    for row in made:
        cells = []
        for device in DEVICES:
            able = device.capability >= row.capability
            cells.append(f"{sum(floor_ms(stage, device, row.bits / 8) for stage in plan):.2f}" if able else "")
        yield f"| {row.precision} | {' | '.join(cells)} |"
