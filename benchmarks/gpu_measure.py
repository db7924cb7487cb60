"""What the GPU benchmark measures: milliseconds by stage, taken in turn, and distances of actions.

The observations are the same ones for every contender, whatever process draws them.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gpu_process import Contender, Failed

from ki_edge.config import Pi05Config
from ki_edge.policy.images import model_pictures

Array = npt.NDArray[Any]
SLOTS, PADDED = 3, 200  # openpi's cameras and prompt length
BLOCKS = 8  # of colour, along each side of a picture
WARM_UP = 3
RUN_S = 120.0  # for one inference; the first one compiles kernels and captures graphs
STEPS, ONE = 10, 1


@dataclass(frozen=True)
class Case:
    """`cameras` present of three and `tokens` of the prompt's 200 places.

    `batch` rows at once: every second one has the last cameras instead of the first, and half of the tokens.
    """

    cameras: int
    tokens: int
    steps: int
    seed: int = 0
    batch: int = 1


@dataclass(frozen=True, eq=False)
class Observation:
    """As openpi pads it, zeros where nothing is; noise f32 [B, H, A]; state f32 [B, A] for a π0, else None."""

    images: Array  # [B, N, h, w, 3] of the type of the model's pictures
    camera_mask: Array  # bool [B, N]
    prompt_tokens: Array  # i32 [B, T]
    prompt_mask: Array  # bool [B, T]
    state: Array | None
    noise: Array

    @property
    def arrays(self) -> tuple[Array, Array, Array, Array]:
        """In the order of the prefix graph."""
        return self.images, self.camera_mask, self.prompt_tokens, self.prompt_mask

    def trimmed(self) -> Observation:
        """Without what is absent; of one row."""
        present, tokens = self.camera_mask[0], self.prompt_mask[0]
        return Observation(
            self.images[:, present],
            self.camera_mask[:, present],
            self.prompt_tokens[:, tokens],
            self.prompt_mask[:, tokens],
            self.state,
            self.noise,
        )


def draw(config: Pi05Config, case: Case) -> Observation:
    """Coloured blocks under noise, and any tokens."""
    rng, size = np.random.default_rng(case.seed), config.vision.image_size
    rows = np.arange(case.batch)[:, None]
    slots = np.where(rows % 2, np.arange(SLOTS)[::-1], np.arange(SLOTS))
    present = slots < case.cameras
    prompt = np.arange(PADDED)[None] < np.where(rows % 2, -(-case.tokens // 2), case.tokens)
    cells = -(-size // BLOCKS)
    blocks = rng.integers(0, 256, (case.batch, SLOTS, BLOCKS, BLOCKS, 3)).repeat(cells, axis=2).repeat(cells, axis=3)
    pictures = np.clip(blocks[:, :, :size, :size] + rng.integers(-40, 41, (case.batch, SLOTS, size, size, 3)), 0, 255)
    tokens = rng.integers(3, config.vocab_size, (case.batch, PADDED)) * prompt
    shape = (case.batch, config.action_horizon, config.action_dim)
    state = rng.standard_normal((case.batch, config.action_dim), np.float32) if config.has_state else None
    images = model_pictures(np.asarray(pictures * present[:, :, None, None, None], np.uint8), config.pictures)
    noise = rng.standard_normal(shape, np.float32)
    return Observation(images, present, tokens.astype(np.int32), prompt, state, noise)


def request(case: Case, save: Path | None = None) -> dict[str, Any]:
    """A worker's request for one inference."""
    return {"do": "run", "case": case.__dict__, "save": None if save is None else str(save)}


def warm_up(contender: Contender, cameras: int, tokens: int, limit_s: float) -> None:
    """Run both step counts until kernels are compiled and graphs captured."""
    for steps in (STEPS, ONE):
        for at in range(WARM_UP):
            contender.ask(request(Case(cameras, tokens, steps)), limit_s if at == 0 else RUN_S)


def latency(contenders: Sequence[Contender], cameras: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Medians over rounds in each of which every contender runs once with ten steps and once with one.

    A step is a ninth of the difference, the prefix what is left: so it does not matter whether a backend waits between
    its stages. A contender that fails is left out from then on.
    """
    times: dict[str, dict[int, list[float]]] = {each.name: {STEPS: [], ONE: []} for each in contenders}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for contender in contenders:
            if contender.name in failed:
                continue
            try:
                for steps in (STEPS, ONE):
                    answer = contender.ask(request(Case(cameras, tokens, steps)), RUN_S)
                    times[contender.name][steps].append(answer["total"])
            except Failed as error:
                failed[contender.name] = str(error)
    rows = {name: _stages(found) for name, found in times.items() if name not in failed and found[STEPS]}
    memory = {each.name: each.memory for each in contenders if each.memory is not None}
    facts = {"cameras": cameras, "tokens": tokens, "rounds": rounds}
    return {**facts, "contenders": rows, "memory_mb": memory, "failed": failed}


def _stages(times: Mapping[int, Sequence[float]]) -> dict[str, float]:
    total, once = statistics.median(times[STEPS]), statistics.median(times[ONE])
    step = (total - once) / (STEPS - ONE)
    return {"total": total, "p90": float(np.percentile(times[STEPS], 90)), "step": step, "prefix": total - STEPS * step}


def parity(
    model: str, reference: Contender, others: Sequence[Contender], observations: int, folder: Path
) -> list[dict[str, Any]]:
    """Distances of each contender's actions from the reference's; one to three cameras, prompts of several lengths.

    Where all contenders take it, every second case has two observations at once, with other cameras absent in each.
    """
    most = min(int(each.facts.get("batch", 1)) for each in others)
    cases = [Case(1 + seed % 3, 5 + 17 * seed % 195, STEPS, seed, 1 + seed % most) for seed in range(observations)]
    expected = [_actions(reference, case, folder) for case in cases]
    return [_row(model, other.name, [_actions(other, case, folder) for case in cases], expected) for other in others]


def _actions(contender: Contender, case: Case, folder: Path) -> np.ndarray:
    path = folder / "actions.npy"
    contender.ask(request(case, path), RUN_S)
    actions: np.ndarray = np.load(path).astype(np.float64)
    return actions


def _row(model: str, name: str, given: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> dict[str, Any]:
    a, b = (np.concatenate(side) for side in (given, expected))  # [rows, H, A]
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    cosines = (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30)
    return {
        "model": model,
        "contender": name,
        "cosine": float(cosines.min()),
        "max_abs": float(np.abs(a - b).max()),
        "relative_l2": float(np.linalg.norm(a - b) / np.linalg.norm(b)),
        "observations": len(a),
    }
