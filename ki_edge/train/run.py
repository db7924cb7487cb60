"""Puts a training run together: what it starts from, data, model, engine, and the state of an earlier run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ki_edge.config import PRESETS, Pi05Config
from ki_edge.errors import ArgumentError, CheckpointError
from ki_edge.planning.recipes import with_recipe
from ki_edge.planning.settings import TrainSettings

from .centering import CenteredPatches, Folding, mean_picture
from .data.opening import MixedData, open_data
from .data.recipe import Choice
from .data.start import Start
from .initialization import from_scratch
from .loop import Trainer, Watcher
from .parallel.checkpoints import STATE, Keep, RunFolder
from .parallel.engine import Engine
from .parallel.processes import Processes, has_bfloat16
from .parallel.starting import open_start
from .record import NOTHING, SHOWN, Origin, RunRecord, code_facts
from .step.training_data import Share
from .summary import summary
from .watching.log import RunLog
from .watching.old_ki import told_by_config
from .watching.robot import Trial
from .watching.trackers import Tracking, check_trackers
from .watching.watchers import Examiner, PageWatcher, TrackingWatcher

EPISODES = 20  # of a robot's evaluation, unless they are named
CENTER_PICTURES = 512  # at least so many, if the data have them, make the mean picture
MOST_THREADS = 4096
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """A run as it is asked for. `given`: settings that the command line names; `origin`: what it is started from.

    `config`: a geometry of one's own, instead of a preset's. What follows it is not recorded, and may be otherwise when
    the run is resumed.
    """

    out: Path
    origin: Origin
    given: Mapping[str, Any]
    recipe: str | None = None
    resume: bool = False
    fresh: bool = False
    accept_changes: bool = False
    config: Pi05Config | None = None
    strategy: str = "auto"
    threads: int = 0
    workers: int | None = None
    cache: Path | None = None
    cache_gb: float = 20.0
    trackers: tuple[str, ...] = ()


def open_run(request: Request, tell: Tell = lambda line: None) -> Trainer:
    """A Trainer ready to run, which the caller closes; every process of a run opens one.

    `tell` is told lines for the user, in the main process. ArgumentError if OUT holds a run and neither `resume` nor
    `fresh` was asked for, if there is nothing to resume, or if it would be resumed with something else; the errors of
    opening data, checkpoint and devices. Nothing of an earlier run is touched before everything is known to fit.
    """
    if not 0 <= request.threads <= MOST_THREADS:
        raise ArgumentError(f"threads {request.threads!s:.40}: expected 1 to {MOST_THREADS}, or 0 for all")
    if request.threads:
        torch.set_num_threads(request.threads)
    check_trackers(request.trackers)
    processes = Processes()
    say = tell if processes.main else _silent
    folder = RunFolder(request.out, Keep.parse(request.given.get("keep", TrainSettings.keep)), processes)
    try:
        return _opened(request, folder, processes, say)
    except BaseException:
        folder.abandon()
        raise


def _opened(request: Request, folder: RunFolder, processes: Processes, say: Tell) -> Trainer:
    before = _before(request, folder)
    settings, origin = _settings(request, before, processes), _origin(request, before)
    trial = _trial(origin, settings)
    if before is not None and not request.accept_changes:  # what needs no data is known to fit before they are read
        before.check(replace(before, settings=settings, origin=origin), request.out, accept=False)
    start = _start(origin, request.config, say)
    data = open_data(
        origin.datasets, start, settings,
        horizon=origin.horizon or None, map_file=origin.map or None,
        choice=Choice(origin.fast, origin.fast_vocabulary, origin.fast_placement),
        cache=request.cache, cache_gb=request.cache_gb, workers=request.workers, say=say,
    )  # fmt: skip
    record = RunRecord(settings, origin, {**_flat("model", data.config.to_dict()), **data.facts(), **code_facts()})
    changed = [] if before is None else before.check(record, request.out, accept=request.accept_changes)
    for line in changed:
        say(f"changed: {line}")
    say(f"reading the weights of {origin.init} ..." if origin.init else "making a model, and its mean picture ...")
    engine = _engine(start, data, settings, request.strategy)
    latest = folder.latest()
    if before is not None and latest is not None:
        _load(engine, latest, changed)
    else:
        folder.clear()
    if (center := CenteredPatches.center_of(engine.model)) is not None:  # of the run's first data, whatever it has now
        engine.finish = Folding(center)
    folder.keep = Keep.parse(settings.keep)
    engine.base = origin.init or None
    for line in summary(engine, data, settings, origin):
        say(line)
    if processes.main:
        record.write(request.out)
    return _trainer(request, folder, engine, data, settings, trial, say)


def _trainer(
    request: Request,
    folder: RunFolder,
    engine: Engine,
    data: MixedData,
    settings: TrainSettings,
    trial: Trial | None,
    say: Tell,
) -> Trainer:
    place, watchers, log = request.out / "training", list[Watcher](), None
    if engine.main:
        data.report.save(place)
        log = RunLog(place, engine.step)
        watchers.append(PageWatcher(place, tell=say))
        if request.trackers:
            config = {name: getattr(settings, name) for name in settings.__dataclass_fields__}
            tracking = Tracking(request.trackers, place, config, step=engine.step, tell=say)
            watchers.append(TrackingWatcher(tracking))
    judge = Examiner(place, trial, tell=say) if settings.eval_every else None
    return Trainer(engine, data, settings, folder, log, judge=judge, watchers=watchers)


def _load(engine: Engine, latest: Path, changed: Sequence[str]) -> None:
    """The state of the run. CheckpointError, which names what was changed if it may be why the state does not fit."""
    try:
        engine.load_state(latest / STATE)
    except CheckpointError as error:
        if not changed:
            raise
        shown = "; ".join(changed[:SHOWN]) + ("; ..." if len(changed) > SHOWN else "")
        raise CheckpointError(
            f"with what was changed the run's state does not fit ({shown}): start another run from its weights, with "
            f"--init {latest}. {error}"
        ) from error


def _before(request: Request, folder: RunFolder) -> RunRecord | None:
    """The record of the run that is gone on with; None for a new one."""
    exists = folder.latest() is not None
    if exists and not (request.resume or request.fresh):
        raise ArgumentError(f"{request.out} holds a training run: go on with --resume, or start over with --fresh")
    if not request.resume:
        return None
    if not exists:
        raise ArgumentError(NOTHING.format(out=request.out))
    return RunRecord.read(request.out)


def _settings(request: Request, before: RunRecord | None, processes: Processes) -> TrainSettings:
    """What is given wins over the recipe, or over what the run was started with; precision is what the device has."""
    if before is None:
        settings = with_recipe(request.recipe, request.given)
        if "bfloat16" not in request.given:
            settings = replace(settings, bfloat16=has_bfloat16(processes.device))
    elif request.recipe is not None:
        settings = with_recipe(request.recipe, request.given, before.settings)
    else:
        settings = replace(before.settings, **request.given)
    return settings


def _trial(origin: Origin, settings: TrainSettings) -> Trial | None:
    """The robot that checkpoints are tried out on, if any."""
    trial = Trial(origin.eval_robot, origin.eval_episodes or EPISODES) if origin.eval_robot else None
    if trial is not None and not settings.eval_every:
        raise ArgumentError("--eval-robot: say how often with --eval-every")
    if settings.eval_every and not settings.held_out and trial is None:
        raise ArgumentError("--eval-every: there is nothing to evaluate on: say --held-out 0.1 or --eval-robot")
    return trial


def _origin(request: Request, before: RunRecord | None) -> Origin:
    """What is given, or what the run was started with."""
    if before is None:
        if not request.origin.datasets:
            raise ArgumentError("no dataset: name what is to be trained on")
        return request.origin
    given = {name: value for name in Origin.__dataclass_fields__ if (value := getattr(request.origin, name))}
    return replace(before.origin, **given)


def _start(origin: Origin, config: Pi05Config | None, say: Tell) -> Start:
    if origin.init:
        if (suspicion := told_by_config(Path(origin.init))) is not None:
            say(f"{suspicion} (python -m ki_edge.train.probe)")
        return Start.from_checkpoint(
            origin.init, tokenizer=origin.tokenizer or None, contract=origin.contract or None,
            lerobot_version=origin.lerobot_version or None, base=origin.base or None, say=say,
        )  # fmt: skip
    return Start.from_nothing(config or PRESETS[origin.preset or "tiny"], origin.tokenizer or None)


def _engine(start: Start, data: MixedData, settings: TrainSettings, strategy: str) -> Engine:
    if start.checkpoint is not None:
        model, weights = open_start(start.checkpoint, data.config)
        return Engine(model, settings, strategy=strategy, weights=weights)
    model, center = from_scratch(data.config, seed=settings.seed), _mean_picture(data, settings)
    CenteredPatches.install(model, center)
    return Engine(model, settings, strategy=strategy)


def _mean_picture(data: MixedData, settings: TrainSettings) -> torch.Tensor:
    """Of the pictures of the first steps, absent ones left out: the same in every process."""
    steps = data.steps(0, Share())
    batches = [batch for step in islice(steps, math.ceil(CENTER_PICTURES / settings.batch)) for batch in step]
    steps.close()  # type: ignore[attr-defined]
    seen = [batch.observation.images[batch.observation.camera_mask] for batch in batches]
    return mean_picture(torch.cat(seen))


def _silent(line: str) -> None:
    """What other processes than the main one say."""


def _flat(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(f"{name}.{key}", inner)
    return found
