"""Opens everything that a run learns from, and makes of it what the training loop takes (`TrainingData`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ki_edge.errors import ArgumentError, DatasetError
from ki_edge.planning.settings import TrainSettings

from .asked import Wanted, named
from .assembly import Assembler, TextSource
from .cache import FrameCache, open_caches
from .frames import Frames, open_frames
from .loading import default_workers
from .mapping import Slots, map_features, read_map
from .mixed import MixedData
from .mixture import Mixture
from .recipe import Choice, Recipe, Robot
from .source import ActionSource, make_source, picture_of, split
from .start import Start
from .statistics import Measured
from .texts import SAMPLES, TextSet
from .token_report import TokenReport

Say = Callable[[str], object]
__all__ = ["MixedData", "open_data"]
FITTED = 5_000  # frames of each dataset that tokens are fitted on and measured by


def open_data(
    datasets: Sequence[str],
    start: Start,
    settings: TrainSettings,
    *,
    horizon: int | None = None,
    map_file: str | Path | None = None,
    choice: Choice | None = None,
    cache: str | Path | None = None,
    cache_gb: float = 20.0,
    workers: int | None = None,
    say: Say = lambda line: None,
) -> MixedData:
    """Everything that a run learns from.

    datasets   "PATH[:WEIGHT]" each: a LeRobotDataset (v3.0, v2.1), its Hub id, an .npz episode, a folder of these, or a
               text set (`texts.py`). WEIGHT: its share of every batch, relative to the others'; given for all or for
               none, and then as many as each has frames or text samples
    start      the model's geometry, and the checkpoint that it starts from (`start.py`)
    settings   batch, seed, held_out, flow_draws, rtc_max_delay, rtc_offset, augment, fast_loss and steps are heeded
    horizon    actions of a chunk; None: the geometry's
    map_file   which features are what (`mapping.py`); None: guessed
    choice     of tokens (`recipe.py`); its rtc_max_delay is that of `settings`
    cache      folder in which decoded pictures are kept; None: none are
    cache_gb   how large it may become, gigabytes
    workers    processes that prepare batches; 0: none, they are made when they are asked for; None: by the cores
    say        is told lines for the user: maps, weights, statistics that are odd, the cache

    KiEdgeErrors, one line: DatasetError for data that are damaged, of an unknown version, do not fit the model or each
    other; ArgumentError for arguments out of range and a map file that is wrong.
    """
    wanted = named(datasets, say)
    _check(horizon, workers, settings)
    horizon = start.config.action_horizon if horizon is None else horizon
    texts = [one for one in wanted if (one.path / SAMPLES).is_file()]
    recorded = [one for one in wanted if one not in texts]
    if not recorded:
        raise ArgumentError("no dataset of actions: a policy learns from recorded episodes, text sets come beside them")
    sources = _sources(recorded, start, settings, map_file, say)
    sets = [TextSet.open(one.path) for one in texts]
    recipe, report = _recipe(
        start, sources, sets, horizon, replace(choice or Choice(), rtc_max_delay=settings.rtc_max_delay), settings, say
    )
    spoken = _spoken(texts, sets, sources, settings)
    ordered = [*recorded, *texts]
    sizes = [source.samples for source in sources] + [len(one.trained) for one in spoken]
    weights = _weights(ordered, sizes, say)
    caches = _caches(cache, cache_gb, sources, recipe, say)
    tasks, places = _tasks(sources, texts)
    mixture = Mixture(sizes, weights, settings.batch, settings.seed)
    assembler = Assembler(tuple(sources), tuple(spoken), places, recipe, settings, mixture, tuple(caches))
    facts = _facts(ordered, weights, sources, spoken, recipe)
    return MixedData(assembler, tasks, facts, default_workers() if workers is None else workers, report)


def _check(horizon: int | None, workers: int | None, settings: TrainSettings) -> None:
    if horizon is not None and not 1 <= horizon <= 4096:
        raise ArgumentError(f"--horizon {horizon}: expected 1 to 4096 actions")
    if workers is not None and not 0 <= workers <= 1024:
        raise ArgumentError(f"--workers {workers}: expected 0 to 1024")
    if not 0.0 <= settings.held_out < 1.0:
        raise ArgumentError(f"--held-out {settings.held_out:g}: expected a share from 0 to below 1 of the episodes")


def _sources(
    recorded: Sequence[Wanted], start: Start, settings: TrainSettings, map_file: str | Path | None, say: Say
) -> list[ActionSource]:
    names = [one.name for one in recorded]
    told = {} if map_file is None else read_map(Path(map_file), names)
    slots = Slots(list(start.slots or ()), fixed=start.slots is not None)
    frames: list[Frames] = [open_frames(one.path) for one in recorded]
    maps = [map_features(one, name, slots, told.get(name)) for one, name in zip(frames, names, strict=True)]
    maps = [one.with_slots(slots.names) for one in maps]
    sources = []
    for number, (dataset, name, features) in enumerate(zip(frames, names, maps, strict=True)):
        for line in features.lines(name):
            say(line)
        say(f"{name}: reading the numbers of {len(dataset.episodes)} episodes ...")
        source = make_source(
            dataset, name, features, held_out=settings.held_out, seed=settings.seed, number=number
        )  # fmt: skip
        if source.action_dim > start.config.action_dim:
            raise DatasetError(
                f"{dataset.path}: an action has {source.action_dim} numbers ({' + '.join(features.action)}), the model "
                f"has room for {start.config.action_dim}: map fewer with --map FILE, or choose another model"
            )
        for camera in range(len(source.features)):  # a film that cannot be read is told now, not after hours
            picture_of(source, 0, camera)
        sources.append(source)
    return sources


def _robot(source: ActionSource, measured: Mapping[str, Measured], seed: int, horizon: int) -> Robot:
    tasks, states, chunks = source.sample(FITTED, seed, horizon)
    number = {task: at for at, task in enumerate(source.tasks)}
    return Robot(
        name=source.name,
        cameras=source.cameras,
        stats={part: one.stats for part, one in measured.items()},
        tasks=source.tasks,
        frame_tasks=np.array([number[task] for task in tasks], np.int64),
        state=states,
        chunks=chunks,
        control_hz=source.control_hz,
        action_names=source.action_names,
        delta_mask=source.delta_mask,
        held_chunks=source.held_chunks(horizon),
    )


def _recipe(
    start: Start,
    sources: Sequence[ActionSource],
    sets: Sequence[TextSet],
    horizon: int,
    choice: Choice,
    settings: TrainSettings,
    say: Say,
) -> tuple[Recipe, TokenReport]:
    """Statistics and tokens that are fitted to the data, and how well the tokens do."""
    say("measuring states and actions, fitting tokens to them ...")
    measured = [source.measured(horizon) for source in sources]
    for one in (one for both in measured for one in both.values()):
        for note in one.notes:
            say(note)
    robots = [_robot(source, both, settings.seed, horizon) for source, both in zip(sources, measured, strict=True)]
    recipe = Recipe.fit(start, robots, [pair for given in sets for pair in given.texts()], choice)
    report = TokenReport.measure(recipe, robots, [source.samples for source in sources])
    for note in (*recipe.notes, *report.lines(), *report.check(settings.max_long)):
        say(note)
    return recipe, report


def _tasks(sources: Sequence[ActionSource], texts: Sequence[Wanted]) -> tuple[list[str], tuple[tuple[int, ...], ...]]:
    """All tasks of the mixture, and which of them those of each source are; a text set is one."""
    found = list(dict.fromkeys(task for source in sources for task in source.tasks))
    number = {task: at for at, task in enumerate(found)}
    places = [tuple(number[task] for task in source.tasks) for source in sources]
    places += [(len(found) + at,) for at in range(len(texts))]
    return [*found, *(one.name for one in texts)], tuple(places)


def _spoken(
    wanted: Sequence[Wanted], sets: Sequence[TextSet], sources: Sequence[ActionSource], settings: TrainSettings
) -> list[TextSource]:
    """The text sets as sources, numbered behind those of actions."""
    found = []
    for number, (one, given) in enumerate(zip(wanted, sets, strict=True), len(sources)):
        trained, held = split(len(given), settings.held_out, settings.seed, number)
        found.append(TextSource(one.name, given, _text_slots(given, sources), trained, held))
    return found


def _text_slots(texts: TextSet, sources: Sequence[ActionSource]) -> dict[str, int]:
    """The slot that takes a picture of a text set: by its name, or for pictures without names in their order."""
    slots = sources[0].cameras
    found: dict[str, int] = {}
    for source in sources:
        for at, camera in enumerate(source.cameras):
            for name in (camera.slot, camera.key):
                if name is not None:
                    found.setdefault(name, at)
    found |= {str(at): at for at in range(len(slots))}
    if unknown := [name for name in texts.names if name not in found]:
        raise DatasetError(
            f"{texts.folder}: no camera slot takes the picture {unknown[0]!r:.60}; the model has "
            f"{', '.join(camera.slot for camera in slots)}: name it so, or give a list of up to {len(slots)} pictures"
        )
    return {name: found[name] for name in texts.names}


def _weights(wanted: Sequence[Wanted], sizes: Sequence[int], say: Say) -> list[float]:
    given = [float(size) if one.weight is None else one.weight for one, size in zip(wanted, sizes, strict=True)]
    total = sum(given)
    if len(wanted) > 1:
        how = "as given" if wanted[0].weight is not None else "by their numbers of samples"
        shares = ", ".join(
            f"{one.name} {100 * weight / total:.3g} %" for one, weight in zip(wanted, given, strict=True)
        )
        say(f"of every batch, {how}: {shares}")
    return given


def _caches(
    cache: str | Path | None, gigabytes: float, sources: Sequence[ActionSource], recipe: Recipe, say: Say
) -> list[FrameCache | None]:
    if cache is None:
        return [None] * len(sources)
    size = recipe.config.vision.image_size
    wanted = [
        (
            source.name,
            {**source.digests, "features": source.features, "resize": recipe.contracts[0].resize},
            source.frames,
            (len(source.features), size, size, 3),
        )
        for source in sources
    ]
    found, lines = open_caches(Path(cache), gigabytes, wanted)
    for line in lines:
        say(line)
    return list(found)


def _facts(
    wanted: Sequence[Wanted],
    weights: Sequence[float],
    sources: Sequence[ActionSource],
    spoken: Sequence[TextSource],
    recipe: Recipe,
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for at, (one, weight) in enumerate(zip(wanted, weights, strict=True)):
        found[f"data.{one.name}.weight"] = weight / sum(weights)
        if at >= len(sources):
            texts = spoken[at - len(sources)]
            told = {"samples": len(texts.texts), "held_out": len(texts.held), "digest": texts.texts.digest}
            found |= {f"data.{one.name}.{key}": value for key, value in told.items()}
            continue
        source = sources[at]
        told = {
            "frames": source.frames,
            "episodes": len(source.arrays["numbers"]),
            "held_out": len(source.arrays["held"]),
            "cameras": ", ".join(f"{camera.slot}={camera.key}" for camera in source.cameras),
            **source.digests,
        }
        found |= {f"data.{one.name}.{key}": value for key, value in told.items()}
    return {**found, **recipe.facts()}
