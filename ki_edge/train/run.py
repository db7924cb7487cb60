"""Puts a training run together: data, recipe, model, and the state of an earlier run."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch

from ki_edge.arguments import count
from ki_edge.checkpoints import Checkpoint
from ki_edge.config import Pi05Config
from ki_edge.errors import ArgumentError, CheckpointError
from ki_edge.model import load_model
from ki_edge.overlap import MAX_HORIZON

from .centering import CenteredPatches, mean_picture
from .demonstrations import Demonstrations
from .fingerprint import BEFORE, Fingerprint, as_json, digest_weights, gather
from .initialization import from_scratch
from .loop import STATE_FILE, Trainer, read_facts
from .recipe import Examples, Recipe
from .recorded import Progress, decode_recordings
from .step.settings import TrainSettings

CENTER_FRAMES = 2000
PICTURES = "pictures.npy"  # of recorded episodes, as they were decoded
NOTHING = "{out} holds no training run to resume: leave --resume out to start one"


def open_trainer(
    demonstrations: str | Path,
    out: str | Path,
    config: Pi05Config,
    settings: TrainSettings,
    *,
    init: str | Path | None = None,
    resume: bool = False,
    fresh: bool = False,
    threads: int = 0,
    horizon: int | None = None,
    progress: Progress = lambda done, of: None,
) -> Trainer:
    """A Trainer ready to run. Everything that is fitted to the data is fitted again on resume: it is deterministic.

    `demonstrations`: recorded episodes (`recorded.py`), in chunks of `horizon` actions, None: the model's; their
    pictures are decoded into `out`. Or a folder of `demonstrations.py`, which has its own horizon.
    `init`: checkpoint folder whose weights the run starts from; without one they are random.
    ArgumentError if `out` holds a run and neither `resume` nor `fresh` was asked for, nothing to resume, or a run with
    other settings, another model or other demonstrations (save_every and log_every may change).
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ArgumentError(f"{out} is a file: name a folder for the checkpoint")
    if threads < 0:
        raise ArgumentError(f"threads {threads}: expected at least 1, or 0 for all")
    exists = (out / "training" / STATE_FILE).is_file()
    if exists and not (resume or fresh):
        raise ArgumentError(f"{out} holds a training run: go on with --resume, or start over with --fresh")
    if resume and not exists:
        raise ArgumentError(NOTHING.format(out=out))
    if threads:
        torch.set_num_threads(threads)
    data = _open_data(Path(demonstrations), out, config, horizon, progress)
    recipe = Recipe.fit(data, config, rtc_max_delay=settings.rtc_max_delay)
    model = from_scratch(recipe.config, seed=settings.seed, knowledge_insulation=settings.knowledge_insulation)
    center = mean_picture(torch.from_numpy(np.array(data.images[:CENTER_FRAMES])))
    start: Fingerprint | None = None
    if init is not None:
        state = _initial_state(Path(init), recipe.config)
        start = digest_weights(state)
        model.load_state_dict(CenteredPatches.unfold(state, center))
    CenteredPatches.install(model, center)
    facts = as_json(gather(data, recipe.config, asdict(settings), start))
    trainer = Trainer(model, Examples.encode(data, recipe), recipe, settings, out, facts)
    if resume:
        trainer.resume()
    else:
        for stale in (trainer.log_path, out / "training" / STATE_FILE):
            stale.unlink(missing_ok=True)
    return trainer


def _open_data(path: Path, out: Path, config: Pi05Config, horizon: int | None, progress: Progress) -> Demonstrations:
    if (path / "meta.json").is_file():
        data = Demonstrations.open(path)
        if horizon not in (None, data.meta["horizon"]):
            raise ArgumentError(f"horizon {horizon}: the chunks in {path} have {data.meta['horizon']} actions")
        return data
    size = config.vision.image_size
    steps = count(config.action_horizon if horizon is None else horizon, "horizon", MAX_HORIZON)
    place = out / "training" / PICTURES
    return decode_recordings(path, place, horizon=steps, size=(size, size), progress=progress)


def recorded_settings(out: str | Path) -> TrainSettings:
    """The settings of the run in `out`. ArgumentError if there is none, CheckpointError if its state is damaged."""
    path = Path(out) / "training" / STATE_FILE
    if not path.is_file():
        raise ArgumentError(NOTHING.format(out=out))
    _, facts = read_facts(path)
    given = {name.removeprefix("settings."): value for name, value in facts.items() if name.startswith("settings.")}
    given = {**{name.removeprefix("settings."): value for name, value in BEFORE.items()}, **given}
    names = {field.name: type(field.default) for field in fields(TrainSettings)}
    if given.keys() != names.keys() or any(type(given[name]) is not kind for name, kind in names.items()):
        raise CheckpointError(f"{path}: its settings are not those that this version knows: start over with --fresh")
    return TrainSettings(**given)


def _initial_state(folder: Path, config: Pi05Config) -> dict[str, torch.Tensor]:
    """Weights of another checkpoint. None of them depends on the horizon, nor on how chunks are continued."""
    checkpoint = Checkpoint.open(folder)
    given = replace(checkpoint.config, action_horizon=config.action_horizon, rtc=config.rtc)
    differ = [
        f"{field.name} {getattr(given, field.name)}, not {getattr(config, field.name)}"
        for field in fields(config)
        if getattr(given, field.name) != getattr(config, field.name)
    ]
    if differ:
        raise ArgumentError(f"{folder} cannot be the start of this run: its model has {'; '.join(differ)}")
    return load_model(checkpoint).state_dict()
