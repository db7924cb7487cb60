"""Sample predictions of an evaluation: their file, and what of train.html shows them against the recorded chunks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ki_edge.errors import CheckpointError
from ki_edge.files.reading import read_object
from ki_edge.files.writing import write_file

from .curves import Curve, chart, legend

if TYPE_CHECKING:
    from .evaluation import Prediction

PREDICTIONS = "predictions.json"
MOST_SHOWN, MOST_DIMS, MOST_ACTIONS = 6, 32, 4096
NO_ACTIONS = "Its likeliest tokens spell no actions."
UNSPELLED = "FAST has no tokens for these recorded actions: they lie outside what it was fitted on."
KEYS = (("recorded", 7), ("sampled by flow matching", 0), ("decoded from FAST tokens", 1))


def save_predictions(folder: Path, step: int, predictions: Sequence[Prediction]) -> None:
    """Write them into OUT/training, in place of those of the evaluation before. CheckpointError if that fails."""
    content = {
        "step": step,
        "predictions": [
            {
                "where": one.where,
                "task": one.task,
                "names": list(one.names),
                "recorded": _plain(one.recorded),
                "flow": _plain(one.flow),
                "fast": None if one.fast is None else _plain(one.fast),
                "spelled": one.spelled,
            }
            for one in predictions
        ],
    }
    write_file(folder / PREDICTIONS, json.dumps(content, allow_nan=False), CheckpointError)


def prediction_section(folder: Path) -> str:
    """The predictions as HTML, a panel for each number of an action; "" without them."""
    try:
        content = read_object(folder / PREDICTIONS, CheckpointError)
    except CheckpointError:
        return ""
    found = content.get("predictions")
    shown = [html for one in found[:MOST_SHOWN] if (html := _one(one))] if isinstance(found, list) else []
    if not shown:
        return ""
    note = f"Held-out chunks under the moving average of step {escape(str(content.get('step')))}, in robot units."
    return f'<p class="note">{note}</p>{legend(KEYS)}{"".join(shown)}'


def _one(content: Any) -> str:
    if not isinstance(content, dict):
        return ""
    recorded, flow, fast = (_rows(content.get(name)) for name in ("recorded", "flow", "fast"))
    if recorded is None or flow is None or flow.shape != recorded.shape:
        return ""
    fast = fast if fast is not None and fast.shape == recorded.shape else None
    names = content.get("names")
    names = names if isinstance(names, list) else []
    ticks = np.arange(len(recorded), dtype=np.float64)
    panels = []
    for dim in range(min(recorded.shape[1], MOST_DIMS)):
        drawn = [Curve("", ticks, recorded[:, dim], 7, "thick"), Curve("", ticks, flow[:, dim], 0)]
        drawn += [] if fast is None else [Curve("", ticks, fast[:, dim], 1, "dashed")]
        name = str(names[dim]) if dim < len(names) else f"action {dim}"
        panels.append(
            f'<div><span class="note">{escape(name)}</span>{chart(drawn, axis="action", width=420, height=150)}</div>'
        )
    why = UNSPELLED if content.get("spelled") is False else NO_ACTIONS
    none = "" if fast is not None else f'<p class="note">{why}</p>'
    title = f"{content.get('where')}: {content.get('task')}"
    return f'<h3>{escape(title)}</h3>{none}<div class="panels">{"".join(panels)}</div>'


def _rows(value: Any) -> npt.NDArray[np.float64] | None:
    """Numbers [h,a] of lists; None for anything else."""
    if not isinstance(value, list) or not 0 < len(value) <= MOST_ACTIONS:
        return None
    if not all(isinstance(row, list) and 0 < len(row) == len(value[0]) <= MOST_ACTIONS for row in value):
        return None
    if not all(isinstance(number, int | float | None) for row in value for number in row):
        return None
    return np.array([[np.nan if number is None else number for number in row] for row in value], np.float64)


def _plain(actions: npt.NDArray[np.float64]) -> list[list[float | None]]:
    return [[float(f"{number:.6g}") if np.isfinite(number) else None for number in row] for row in actions.tolist()]
