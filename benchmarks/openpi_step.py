"""Our training step without knowledge insulation beside openpi's own, on the same weights and samples.

    python benchmarks/openpi_step.py --depth 2 --rounds 3

Runs in an environment of openpi's, not in ours: its source on PYTHONPATH beside this project's, torch, transformers
4.53.2 with `src/openpi/models_pytorch/transformers_replace` copied over it, jax, flax, einops, augmax and orbax.
The real widths with `--depth` layers in each transformer; forward and backward pass in float32, in turn, medians.
The tables of words stay as they are in both, to save memory. Losses must be equal. Exit status 1 if they are not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ki_edge.checkpoints.layout.keys import EMBEDDING, LM_HEAD, checkpoint_key
from ki_edge.config import PI05, Pi05Config
from ki_edge.model import Observation, Pi05
from ki_edge.proc import cpu_info

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
SAME = 1e-4  # relative


def geometry(depth: int) -> Pi05Config:
    """The real model with so many layers in each transformer."""
    parts = {name: replace(getattr(PI05, name), depth=depth) for name in ("vision", "backbone", "expert")}
    return replace(PI05, **parts)


def openpis_model(ours: Pi05) -> Any:
    """openpi's model of the same geometry with the same weights."""
    from openpi.models import gemma
    from openpi.models_pytorch.pi0_pytorch import PI0Pytorch

    config, real = ours.config, gemma.get_config
    gemma.get_config = lambda name: replace(real(name), depth=config.backbone.depth)
    settings = SimpleNamespace(
        pi05=True, paligemma_variant="gemma_2b", action_expert_variant="gemma_300m", dtype="float32",
        action_dim=config.action_dim, action_horizon=config.action_horizon, pytorch_compile_mode=None,
    )  # fmt: skip
    theirs = PI0Pytorch(settings)
    encoder = theirs.paligemma_with_expert.paligemma.model.vision_tower.vision_model.encoder
    encoder.layers = encoder.layers[: config.vision.depth]
    state = {checkpoint_key(name): value for name, value in ours.state_dict().items()}
    state[LM_HEAD] = state[EMBEDDING]
    missing, unknown = theirs.load_state_dict(state, strict=False)
    left = [name for name in missing if "lm_head" not in name]
    if left or unknown:
        raise SystemExit(f"openpi's model has other tensors: {left[:5]} are missing, {unknown[:5]} are too many")
    whole = theirs._preprocess_observation
    theirs._preprocess_observation = lambda observation, train: whole(observation, train=False)  # no augmentation
    return theirs.train()


def samples(config: Pi05Config, batch: int, tokens: int) -> tuple[Observation, Any, Tensor, Tensor, Tensor]:
    """The same batch for both: ours, openpi's, actions, noise, times."""
    draw = torch.Generator().manual_seed(0)
    size = config.vision.image_size
    images = torch.rand(batch, len(CAMERAS), size, size, 3, generator=draw) * 2 - 1
    prompt = torch.randint(10, 10_000, (batch, tokens), generator=draw)
    seen = torch.ones(batch, len(CAMERAS), dtype=torch.bool)
    valid = torch.ones(batch, tokens, dtype=torch.bool)
    theirs = SimpleNamespace(
        images={name: images[:, at].permute(0, 3, 1, 2) for at, name in enumerate(CAMERAS)},
        image_masks={name: seen[:, at] for at, name in enumerate(CAMERAS)},
        state=torch.zeros(batch, config.action_dim), tokenized_prompt=prompt, tokenized_prompt_mask=valid,
        token_ar_mask=None, token_loss_mask=None,
    )  # fmt: skip
    chunk = (batch, config.action_horizon, config.action_dim)
    actions, noise = torch.randn(chunk, generator=draw), torch.randn(chunk, generator=draw)
    times = torch.rand(batch, generator=draw) * 0.9 + 0.05
    return Observation(images, seen, prompt, valid), theirs, actions, noise, times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=2, help="layers of each transformer (2)")
    parser.add_argument("--batch", type=int, default=1, help="samples (1)")
    parser.add_argument("--tokens", type=int, default=64, help="of a prompt, without padding (64)")
    parser.add_argument("--rounds", type=int, default=3, help="that count (3)")
    options = parser.parse_args()
    torch.manual_seed(0)
    ours = Pi05(geometry(options.depth), knowledge_insulation=False).train()
    theirs = openpis_model(ours)
    for model in (ours, theirs):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("embed_tokens" not in name and "lm_head" not in name)
    observation, given, actions, noise, times = samples(ours.config, options.batch, options.tokens)
    forms = {
        "openpi's step": (theirs, lambda: theirs.forward(given, actions, noise, times).mean()),
        "ours, not insulated": (
            ours, lambda: ours.compute_loss(observation, actions, noise=noise, time=times).flow.mean()
        ),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    losses: dict[str, float] = {}
    for _ in range(options.rounds + 1):
        for name, (model, form) in forms.items():
            model.zero_grad(set_to_none=True)
            started = time.perf_counter()
            loss = form()
            loss.backward()
            seconds[name].append(time.perf_counter() - started)
            losses[name] = loss.item()
    found = {name: statistics.median(each[1:]) for name, each in seconds.items()}
    print(f"{cpu_info('model name')}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32")
    for name, value in found.items():
        print(f"{name}: {value:.2f} s, loss {losses[name]:.6f}")
    one, other = found.values()
    print(f"openpi's / ours: {one / other:.2f}")
    first, second = losses.values()
    return 0 if abs(first - second) <= SAME * abs(first) else 1


if __name__ == "__main__":
    sys.exit(main())
