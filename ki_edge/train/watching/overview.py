"""What of train.html comes first: how far the run is and what to do next, and in one table what is trained on what."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from .curves import table
from .log import LOG, Row, column

BEST = "best"  # the link, as `parallel.checkpoints` makes it
DATA, MOST_SETS = "data.", 12
HELD_OUT = "held_out_action_error_normalised"


def overview(folder: Path, rows: Sequence[Row], evaluations: Sequence[Row], run: Mapping[str, Any]) -> str:
    """HTML of the files in OUT/training."""
    settings, origin, facts = (_object(run.get(name)) for name in ("settings", "origin", "facts"))
    lines = [_state(folder, rows, settings), *_best(folder, evaluations), *_next(folder, rows, settings)]
    shown = "".join(f"<p>{line}</p>" for line in lines)
    cells = [*_data(facts), *_model(settings, origin), *_learning(settings)] if settings else []
    return shown + (table(("", ""), cells) if cells else "")


def _state(folder: Path, rows: Sequence[Row], settings: Mapping[str, Any]) -> str:
    if not rows:
        return "Nothing was logged yet."
    step, steps = rows[-1]["step"], settings.get("steps")
    of = f" of {steps:,}" if isinstance(steps, int) else ""
    try:
        when = datetime.fromtimestamp((folder / LOG).stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OSError, OverflowError, ValueError):
        when = "an unknown time"
    text = f"Step {step:,}{of}, logged {when}" + _took(rows, settings)
    if isinstance(steps, int):
        text += ". The run is finished." if step >= steps else _left(rows, settings, steps - step)
    return escape(text)


def _seconds(rows: Sequence[Row], settings: Mapping[str, Any]) -> np.ndarray[Any, Any] | None:
    """Of each row since the one before; None where that is not known."""
    batch = settings.get("batch")
    if not isinstance(batch, int):
        return None
    taken = np.diff(column(rows, "step"), prepend=0.0)
    speed = column(rows, "samples_per_s")
    return np.asarray(np.where(speed > 0, taken * batch / np.where(speed > 0, speed, 1.0), 0.0))


def _took(rows: Sequence[Row], settings: Mapping[str, Any]) -> str:
    seconds = _seconds(rows, settings)
    return "" if seconds is None else f", after {_duration(float(seconds.sum()))} of training"


def _left(rows: Sequence[Row], settings: Mapping[str, Any], steps: int) -> str:
    seconds, batch = _seconds(rows[-5:], settings), settings.get("batch")
    speed = column(rows[-5:], "samples_per_s")
    if seconds is None or not isinstance(batch, int) or not np.isfinite(speed).any() or not np.nanmean(speed) > 0:
        return "."
    return f"; at its speed {_duration(steps * batch / float(np.nanmean(speed)))} are left, without evaluations."


def _best(folder: Path, evaluations: Sequence[Row]) -> Iterator[str]:
    """Which checkpoint is the best, and why."""
    try:
        name = (folder.parent / BEST).readlink().name
    except OSError:
        return
    step = name.rpartition("_")[2]
    row = next((row for row in evaluations if step.isdigit() and row["step"] == int(step)), {})
    why = []
    if isinstance(success := row.get("robot_success"), int | float):
        why.append(f"success {100 * success:.0f} %")
    if isinstance(error := row.get(HELD_OUT), int | float):
        why.append(f"held-out action error {error:.3g}, normalised")
    yield escape(f"Best checkpoint: {name}" + (f" ({', '.join(why)})" if why else "") + ".")


def _next(folder: Path, rows: Sequence[Row], settings: Mapping[str, Any]) -> Iterator[str]:
    out, steps = folder.resolve().parent, settings.get("steps")
    if not isinstance(steps, int) or not rows:
        return
    chosen = "best" if (out / BEST).is_symlink() else "last"
    command = f"ki-train --resume -o {shlex.quote(out.name)}"
    if rows[-1]["step"] >= steps:
        command = f"ki-export {shlex.quote(f'{out.name}/{chosen}')} -o {shlex.quote(f'{out.name}/bundle')}"
    what = "Next" if rows[-1]["step"] >= steps else "If it has ended, go on with"
    yield f"{what}: <code>{escape(command)}</code>"


def _data(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A row for each dataset: what it holds, what of it is held out, its share of a batch."""
    names = [name[len(DATA) : -len(".weight")] for name in facts if name.startswith(DATA) and name.endswith(".weight")]
    for name in names[:MOST_SETS]:
        known = {
            key: facts.get(f"{DATA}{name}.{key}") for key in ("episodes", "frames", "samples", "held_out", "weight")
        }
        parts = [f"{known['episodes']} episodes, {known['frames']} frames"] if known["frames"] is not None else []
        parts += [f"{known['samples']} text samples"] if known["samples"] is not None else []
        if known["held_out"]:
            parts.append(f"{known['held_out']} {'text samples' if known['frames'] is None else 'episodes'} held out")
        weight = known["weight"]
        if len(names) > 1 and isinstance(weight, int | float):
            parts.append(f"{100 * weight:.3g} % of every batch")
        yield f"data: {name}", ", ".join(parts)
    if len(names) > MOST_SETS:
        yield "data", f"{len(names) - MOST_SETS} more"


def _model(settings: Mapping[str, Any], origin: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    start = origin.get("init")
    yield "model", f"goes on from {start}" if start else f"a new one, {origin.get('preset') or 'tiny'}"
    still = ["all but the action expert"] if settings.get("expert_only") else list(_list(settings, "freeze"))
    if still:
        yield "frozen", ", ".join(map(str, still))
    for name, label in (("lora", "LoRA, rank"), ("rates", "learning rate times")):
        if pairs := _list(settings, name):
            yield label, ", ".join(f"{pair[0]} {pair[1]}" for pair in pairs if isinstance(pair, list) and len(pair) > 1)


def _learning(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    told = {name: _number(settings.get(name)) for name in settings}
    speaks = settings.get("fast_loss") and not settings.get("expert_only")
    tokens = f", FAST {told.get('fast_weight')}, text {told.get('text_weight')}" if speaks else ", no token losses"
    yield "insulation", "knowledge insulation" if settings.get("knowledge_insulation") else "none"
    yield "loss weights", f"flow {told.get('flow_weight')} ({told.get('flow_draws')} draws a sample){tokens}"
    yield "steps", f"{told.get('steps')} of {told.get('batch')} samples, seed {told.get('seed')}"
    yield (
        "optimiser",
        f"{told.get('optimizer')}, rate {told.get('learning_rate')} after {told.get('warmup')} steps of warm-up, "
        f"clip {told.get('clip')}, moving average {told.get('ema')}",
    )
    augmented = ", pictures augmented" if settings.get("augment") else ""
    yield "products in", ("bfloat16" if settings.get("bfloat16") else "float32") + augmented


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _list(settings: Mapping[str, Any], name: str) -> Sequence[Any]:
    value = settings.get(name)
    return value if isinstance(value, list) else []


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
