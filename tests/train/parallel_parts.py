"""A tiny model and random batches of any composition, for tests of the engine; the same in every process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ki_edge.config import GemmaConfig, Pi05Config, VisionConfig
from ki_edge.model import Observation, Pi05, load_model
from ki_edge.planning.settings import BACKBONE_SIDE
from ki_edge.train.parallel.engine import Engine
from ki_edge.train.parallel.groups import group_of
from ki_edge.train.parallel.sharding import whole
from ki_edge.train.step.batch import ACTIONS, TEXT, Batch
from ki_edge.train.step.training_data import Share

MICRO = Pi05Config(
    vision=VisionConfig(width=16, depth=2, mlp_dim=24, num_heads=2, patch_size=7, image_size=14),
    backbone=GemmaConfig(width=24, depth=3, mlp_dim=40, num_heads=4, num_kv_heads=2, head_dim=8),
    expert=GemmaConfig(width=16, depth=3, mlp_dim=24, num_heads=4, num_kv_heads=2, head_dim=8),
    vocab_size=96,
    action_dim=6,
    action_horizon=5,
)


def random_model(config: Pi05Config = MICRO, *, seed: int = 0) -> Pi05:
    """Random values everywhere, norms and biases included."""
    generator = torch.Generator().manual_seed(seed)
    model = Pi05(config)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.normal_(0.0, scale, generator=generator)
        model.backbone.embed_tokens.weight.mul_(0.3)
    return model


def random_batch(
    step: int,
    size: int = 8,
    *,
    config: Pi05Config = MICRO,
    draws: int = 2,
    texts: int = 0,
    delays: bool = False,
) -> Batch:
    """The whole batch of a step: its last `texts` samples are text-only; with episode ends and missing cameras."""
    rng = np.random.default_rng([7, step])
    side, horizon, dim = config.vision.image_size, config.action_horizon, config.action_dim
    kind = np.where(np.arange(size) < size - texts, ACTIONS, TEXT)

    def tokens(most: int) -> tuple[torch.Tensor, torch.Tensor]:
        mask = np.arange(most) < rng.integers(1, most, size, endpoint=True)[:, None]
        return torch.from_numpy(rng.integers(2, config.vocab_size, mask.shape)), torch.from_numpy(mask)

    cameras = np.ones((size, 2), np.bool_)
    cameras[::3, 1] = False
    pictures = torch.from_numpy(rng.integers(0, 256, (size, 2, side, side, 3), np.uint8))
    observation = Observation(pictures, torch.from_numpy(cameras), *tokens(6), *tokens(7))
    real = np.arange(horizon) < rng.integers(2, horizon, size, endpoint=True)[:, None]
    dims = np.zeros((size, dim), np.bool_)
    dims[:, : dim - 2] = True
    actions = rng.standard_normal((size, horizon, dim)) * dims[:, None] * (kind == ACTIONS)[:, None, None]
    return Batch(
        observation=observation,
        actions=torch.from_numpy(actions).float(),
        real=torch.from_numpy(real & (kind == ACTIONS)[:, None]),
        dims=torch.from_numpy(dims),
        noise=torch.from_numpy(rng.standard_normal((draws * size, horizon, dim))).float(),
        time=torch.from_numpy(rng.beta(1.5, 1.0, draws * size) * 0.999 + 0.001).float(),
        kind=torch.from_numpy(kind),
        source=torch.from_numpy(rng.integers(0, 2, size)),
        task=torch.from_numpy(rng.integers(0, 3, size)),
        row=torch.from_numpy(np.arange(size) + 100 * step),
        delay=torch.from_numpy(rng.integers(0, 2, draws * size, endpoint=True)) if delays else None,
    )


def rows_of(batch: Batch, rows: slice) -> Batch:
    """Some samples of a batch, with all their draws."""
    size = len(batch)

    def pick(value: object) -> object:
        if isinstance(value, Observation):
            return Observation(**{name: pick(part) for name, part in vars(value).items()})
        if not isinstance(value, torch.Tensor):
            return value
        draws = value.reshape(-1, size, *value.shape[1:])  # draw by draw
        return draws[:, rows].reshape(-1, *value.shape[1:])

    return Batch(**{name: pick(value) for name, value in vars(batch).items()})


def shared_out(batch: Batch, share: Share) -> list[Batch]:
    """What one process of a run computes of a step's batch."""
    part = len(batch) // (share.world * share.accumulate)
    first = share.rank * share.accumulate
    return [rows_of(batch, slice(at * part, (at + 1) * part)) for at in range(first, first + share.accumulate)]


def train(engine: Engine, first: int, last: int, *, probe: int = 0, **composition: Any) -> list[dict[str, float]]:
    """Steps first..last of a run over random batches: what each step reported, and every `probe` steps its `leak`."""
    records = []
    for step in range(first, last):
        batches = shared_out(random_batch(step, engine.settings.batch, **composition), engine.share())
        found = leaks(engine, batches) if probe and step % probe == 0 else {}
        result = engine.train_step(batches, engine.settings.rate(step))
        records.append({**result.terms, "grad_norm": result.grad_norm, **found})
    return records


def evaluated(engine: Engine) -> dict[str, torch.Tensor]:
    """What the averaged model makes of a batch, by all the ways in which it is called."""
    batch = random_batch(77, 2, draws=1, config=engine.model.config)
    with engine.averaged() as model:
        losses = model.compute_loss(batch.observation, batch.actions, noise=batch.noise, time=batch.time)
        return {
            "flow": losses.flow.clone(),
            "fast": model.token_loss(batch.observation).clone(),
            "logits": model.fast_logits(batch.observation).clone(),
            "actions": model.sample_actions(batch.observation, noise=batch.noise, num_steps=3).clone(),
            "tokens": model.sample_fast_tokens(batch.observation, max_tokens=4, constrained=False).float(),
        }


def leaks(engine: Engine, batches: list[Batch]) -> dict[str, float]:
    """The largest number in the gradient of the flow loss alone: of the backbone's side, and of the expert's."""
    objective = getattr(engine.objective, "module", engine.objective)
    weights, objective.weights = objective.weights, (1.0, 0.0, 0.0)
    backward(engine, batches)
    objective.weights = weights
    found = {"leak": 0.0, "reached": 0.0}
    for name, parameter in engine.learning.items():
        side = "leak" if group_of(name) in BACKBONE_SIDE else "reached"
        if parameter.grad is not None:
            found[side] = max(found[side], whole(parameter.grad).abs().max().item())
    engine.optimizer.clear()
    return found


def backward(engine: Engine, batches: list[Batch]) -> None:
    """The gradient of a step, and nothing else of it."""
    counts = engine.processes.sum(torch.stack([batch.counts() for batch in batches]).sum(dim=0))
    engine.optimizer.clear()
    for at, batch in enumerate(batches):
        engine._backward(batch, counts, last=at + 1 == len(batches))


def golden_model_and_batch(folder: Path) -> tuple[Pi05, Batch]:
    """The recorded run of the knowledge-insulation equations, as a batch of two samples."""
    inputs = dict(np.load(folder / "inputs.npz"))
    rows = [row[mask] for row, mask in zip(inputs["tokenized_prompt"], inputs["token_loss_mask"], strict=True)]
    mask = np.arange(max(map(len, rows))) < np.array([[len(row)] for row in rows])
    tokens = np.zeros(mask.shape, np.int64)
    tokens[mask] = np.concatenate(rows)
    cameras = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    arrays = [
        np.stack([inputs[f"image/{camera}"] for camera in cameras], axis=1),
        np.stack([inputs[f"image_mask/{camera}"] for camera in cameras], axis=1),
        inputs["prompt_only_tokens"], inputs["prompt_only_mask"], tokens, mask,
    ]  # fmt: skip
    actions, noise, time = (torch.from_numpy(inputs[name]) for name in ("actions", "noise", "time"))
    count, horizon, dim = actions.shape
    zeros = torch.zeros(count, dtype=torch.long)
    observation = Observation(*map(torch.from_numpy, arrays))
    real, dims = torch.ones(count, horizon, dtype=torch.bool), torch.ones(count, dim, dtype=torch.bool)
    model = load_model(folder)
    assert isinstance(model, Pi05)
    return model, Batch(observation, actions, real, dims, noise, time, zeros, zeros, zeros, zeros)
