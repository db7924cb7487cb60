"""What a bundle is compared with, in the same rounds: other bundles, and checkpoints in PyTorch as openpi runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ki_edge.bundle import Bundle
from ki_edge.bundle.files import MANIFEST
from ki_edge.errors import ArgumentError
from ki_runtime.backends.registry import choose_backend
from ki_runtime.policy.sampler import Sampler

from .process import Memory
from .report import Other, Ratio
from .rounds import Contender, Samples, Say, Spread
from .setting import Setting, fresh_process
from .stages import F32, bundle_contender, draw_inputs, draw_noise


@dataclass(frozen=True, eq=False)
class Rival:
    """One of them, opened. `actions`: its actions f32 [1, H, A] on the main case's inputs; None for another model."""

    name: str
    engine: str
    precision: str
    tokens: int
    run: Contender
    actions: Callable[[], F32] | None
    memory: Memory | None = None


def open_others(setting: Setting, say: Say) -> dict[str, Rival]:
    """Of `options.others`, by the name of their contender. torch is imported for checkpoints and nowhere else."""
    found: list[Rival] = []
    for path in setting.options.others:
        if not path.exists():
            raise ArgumentError(f"{path}: no such folder; expected a bundle or a checkpoint to compare with")
        is_bundle = (path / MANIFEST).is_file()
        found += [_open_bundle(setting, path, say)] if is_bundle else _open_checkpoint(setting, path, say)
    return {f"{at}: {rival.name}, {rival.precision}": rival for at, rival in enumerate(found, 2)}


def _open_bundle(setting: Setting, path: Path, say: Say) -> Rival:
    """Another bundle on the inputs of the main case, in its own model's sizes."""
    say(f"opening {path}")
    bundle, main = Bundle.open(path), setting.cases[0]
    config, backend = bundle.manifest.config, choose_backend(setting.options.backend, bundle).name
    memory, _ = fresh_process(replace(setting, bundle=bundle, backend=backend))
    sampler = Sampler.open(bundle, backend, threads=setting.threads, sequential=setting.options.sequential, say=say)
    inputs, noise = draw_inputs(config, setting.space, main), draw_noise(config)
    return Rival(
        name=str(path),
        engine=backend,
        precision=bundle.manifest.precision,
        tokens=main.cameras * config.vision.patches + main.tokens,
        run=bundle_contender(sampler, inputs, noise, main.steps),
        actions=(lambda: main_actions(setting, sampler)) if config == setting.config else None,
        memory=memory,
    )


def _open_checkpoint(setting: Setting, path: Path, say: Say) -> Iterator[Rival]:
    from . import pytorch

    main, config = setting.cases[0], setting.config
    convention = str(setting.bundle.manifest.sampling["time_convention"])
    for dtype in setting.options.dtypes:
        say(f"loading {path} into PyTorch, {dtype}")
        model = pytorch.load(path, dtype, setting.threads, config.pictures)
        pytorch.check_same_model(model, config, path)
        inputs, noise = draw_inputs(config, setting.space, main), draw_noise(config)
        side = pytorch.TorchSide(model, inputs, noise, convention=convention, steps=main.steps)
        tokens = setting.space.slots * config.vision.patches + setting.space.padded
        yield Rival(str(path), "PyTorch", dtype, tokens, side.run, lambda side=side: side.actions)  # type: ignore[misc]


def main_actions(setting: Setting, sampler: Sampler) -> F32:
    """f32 [1, H, A] of the main case."""
    main = setting.cases[0]
    inputs, noise = draw_inputs(setting.config, setting.space, main), draw_noise(setting.config)
    return sampler.sample_actions(*inputs.arrays, state=inputs.state, noise=noise, num_steps=main.steps)


def compare(ours: F32, rivals: Mapping[str, Rival], samples: Mapping[str, Samples], main: str) -> Iterator[Other]:
    """Each of them beside the bundle, whose actions are `ours` and whose contender in the main case is `main`."""
    mine = samples[main].times["total"]
    for name, rival in rivals.items():
        theirs = samples[name].times
        each = np.divide(theirs["total"], mine)
        ratio = Ratio(float(np.median(theirs["total"]) / np.median(mine)), float(each.min()), float(each.max()))
        yield Other(
            name=rival.name,
            engine=rival.engine,
            precision=rival.precision,
            tokens=rival.tokens,
            prefix=Spread.of(theirs["prefix"]),
            denoise=Spread.of(theirs["denoise"]),
            total=Spread.of(theirs["total"]),
            ratio=ratio,
            max_abs_difference=None if rival.actions is None else float(np.abs(rival.actions() - ours).max()),
            memory=rival.memory,
        )
