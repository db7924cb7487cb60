"""train.html: a training run to look at, one file that needs no network, made from the files of OUT/training alone.

python -m ki_edge.train.watching.page OUT    makes it again, also of a run that was killed
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ki_edge.errors import CheckpointError
from ki_edge.files.reading import read_object
from ki_edge.files.writing import write_file

from . import curves
from .curves import Curve, chart, smoothed, table
from .fast_report import fast_section
from .log import EVALUATIONS, LOG, Row, column, read_rows
from .overview import overview
from .predictions import prediction_section

PAGE, RUN = "train.html", "run.json"
LOSSES = {"flow": "flow matching", "fast": "FAST tokens", "text": "words"}
BY_DATASET = {"flow": "flow", "fast": "FAST", "text": "words"}
TITLES = {
    "format": "Version of run.json", "settings": "Settings", "origin": "What it was started from",
    "facts": "Digests and facts of data, model and code",
}  # fmt: skip
MOST_GROUPS = 8  # curves in one panel
LAST = 12  # evaluations in the table
LONG = 200  # characters of a value in a table
STYLE = """
:root { color-scheme: light dark; --ground: #fafafa; --paper: #ffffff; --ink: #1d1d1f; --soft: #5f5f66; --line: #e1e1e6; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ground: #131316; --paper: #1c1c20; --ink: #f0f0f2; --soft: #a3a3ad; --line: #34343b; --bad: #ff7b72; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); max-width: 880px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; margin-bottom: 0.1em; overflow-wrap: anywhere; } h2 { font-size: 1.15em; margin: 2em 0 0.3em; } h3 { font-size: 1em; margin: 1.3em 0 0.2em; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(10em, 42%), 1fr)); gap: 0.6em; margin: 1em 0; }
.tiles div { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 0.55em 0.8em; }
.tiles span { display: block; color: var(--soft); font-size: 0.85em; } .tiles b { font-size: 1.3em; font-weight: 600; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; font-size: 0.92em; } .wide { overflow-x: auto; }
th, td { text-align: left; padding: 0.3em 1.2em 0.3em 0; border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: break-word; }
th { font-weight: 500; color: var(--soft); } td { font-variant-numeric: tabular-nums; }
.note { color: var(--soft); font-size: 0.92em; } .bad { color: var(--bad); } details { margin-top: 1.5em; } summary { cursor: pointer; font-weight: 600; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(380px, 100%), 1fr)); gap: 0.7em; }
"""  # noqa: E501


def write_page(folder: Path) -> Path:
    """Write train.html into OUT/training, whole or not at all. CheckpointError if it cannot be written."""
    page = folder / PAGE
    write_file(page, to_html(folder), CheckpointError)
    return page


def to_html(folder: Path) -> str:
    """The page of the files in OUT/training; what is missing or damaged is left out."""
    rows, evaluations = read_rows(folder / LOG), read_rows(folder / EVALUATIONS)
    run = _object(folder / RUN)
    name = folder.resolve().parent.name
    sections = (
        ("Losses", _losses(rows)),
        ("Losses by dataset", "".join(_grouped(rows, f"{name}/", label) for name, label in BY_DATASET.items())),
        ("Losses by task", _tasks(rows)),
        ("Evaluation on held-out episodes", _evaluation(evaluations)),
        ("Success on the robot", _robot(evaluations)),
        ("Predictions", prediction_section(folder)),
        ("Learning rate and gradient", _optimisation(rows)),
        ("Throughput and memory", _throughput(rows)),
        ("FAST", fast_section(_object(folder / "fast.json"))),
        ("All settings and facts", _facts(run)),
    )
    shown = [(title, content) for title, content in sections if content]
    links = ", ".join(f'<a href="#s{at}">{title}</a>' for at, (title, _) in enumerate(shown))
    body = "".join(f'<h2 id="s{at}">{title}</h2>{content}' for at, (title, content) in enumerate(shown))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Training {escape(name)}</title><style>{STYLE}{curves.STYLE}</style></head><body>
<h1>Training {escape(name)}</h1>
{overview(folder, rows, evaluations, run)}
{_tiles(rows, evaluations)}
<p class="note">{links}</p>
{body}
</body></html>
"""


def _tiles(rows: Sequence[Row], evaluations: Sequence[Row]) -> str:
    """The newest of the most important numbers."""
    found = []
    wanted = (
        (rows, "flow", "flow loss"), (rows, "fast", "FAST loss"), (rows, "samples_per_s", "samples/s"),
        (rows, "loader_samples_per_s", "loader, samples/s"), (evaluations, "held_out_flow", "held-out flow"),
        (evaluations, "held_out_action_error_normalised", "held-out action error, normalised"),
        (evaluations, "robot_success", "robot success"),
    )  # fmt: skip
    for where, name, label in wanted:
        known = column(where, name)
        known = known[np.isfinite(known)]
        if len(known):
            text = f"{100 * known[-1]:.0f} %" if name == "robot_success" else f"{known[-1]:.4g}"
            found.append(f"<div><span>{label}</span><b>{text}</b></div>")
    return f'<section class="tiles">{"".join(found)}</section>' if found else ""


def _losses(rows: Sequence[Row]) -> str:
    steps = column(rows, "step")
    panels = []
    for colour, (name, label) in enumerate(LOSSES.items()):
        values = column(rows, name)
        if np.isfinite(values).any():
            panels.append(chart(smoothed(steps, values, colour, label), log=True))
    return "".join(panels)


def _grouped(rows: Sequence[Row], prefix: str, label: str) -> str:
    """A loss of each dataset, the first of them."""
    names = _columns(rows, prefix)
    steps = column(rows, "step")
    drawn = [
        curve
        for colour, name in enumerate(names[:MOST_GROUPS])
        for curve in smoothed(steps, column(rows, name), colour, f"{label}, {name.removeprefix(prefix)}")
    ]
    left = len(names) - MOST_GROUPS
    more = f'<p class="note">{left} more datasets are in {LOG}.</p>' if left > 0 else ""
    return chart(drawn, log=True) + more if drawn else ""


def _tasks(rows: Sequence[Row]) -> str:
    """The flow loss of each task, now and in the beginning, the worst first."""
    found = []
    for name in _columns(rows, "task/"):
        values = column(rows, name)
        values = values[np.isfinite(values)]
        if len(values):
            found.append(
                (float(values[-25:].mean()), float(values[:25].mean()), name.removeprefix("task/"), len(values))
            )
    found.sort(reverse=True)
    cells = [(task, f"{now:.4g}", f"{first:.4g}", str(count)) for now, first, task, count in found]
    return table(("task", "flow, last 25 rows", "flow, first 25 rows", "rows with it"), cells) if cells else ""


def _optimisation(rows: Sequence[Row]) -> str:
    steps, names = column(rows, "step"), [*_columns(rows, "rate/")]
    rates = [("rate", "learning rate"), *((name, name.removeprefix("rate/")) for name in names)]
    drawn = [Curve(label, steps, column(rows, name), colour) for colour, (name, label) in enumerate(rates)]
    norm = smoothed(steps, column(rows, "grad_norm"), 3, "norm of the gradient, before clipping")
    return chart(drawn, zero=True, height=150) + chart(norm, log=True, height=150)


def _throughput(rows: Sequence[Row]) -> str:
    steps = column(rows, "step")
    speed = [
        Curve("samples/s of the training", steps, column(rows, "samples_per_s"), 0),
        Curve("samples/s that the loader had ready", steps, column(rows, "loader_samples_per_s"), 1),
    ]
    memory = Curve("memory, GB", steps, column(rows, "memory") / 1e9, 4)
    return chart(speed, zero=True, height=150) + chart([memory], zero=True, height=130)


def _evaluation(evaluations: Sequence[Row]) -> str:
    steps = column(evaluations, "step")
    panels = (
        (("held_out_flow", "flow"), ("held_out_fast", "FAST tokens"), ("held_out_text", "words")),
        (("held_out_action_error_normalised", "error of sampled actions, normalised"),
         ("held_out_fast_action_error_normalised", "error of decoded FAST actions, normalised")),
        (("held_out_fast_accuracy", "FAST tokens right"), ("held_out_text_accuracy", "words right"),
         ("held_out_fast_undecodable", "FAST that spells no actions"),
         ("held_out_not_spelled", "recorded chunks that FAST cannot spell")),
    )  # fmt: skip
    drawn = [
        chart(
            [Curve(label, steps, column(evaluations, name), at, dots=True) for at, (name, label) in enumerate(panel)],
            zero=index == 2,
            one=index == 2,
            height=170,
        )
        for index, panel in enumerate(panels)
    ]
    names = [name for name in _columns(evaluations, "held_out_") if "/" not in name]
    cells = [
        (str(row["step"]), *(_cell(row.get(name)) for name in names))
        for row in evaluations[-LAST:]
        if any(name in row for name in names)
    ]
    heads = ("step", *(name.removeprefix("held_out_").replace("_", " ") for name in names))
    units = '<p class="note">Errors are means over recorded actions; where not normalised, in robot units.</p>'
    return "".join(drawn) + (table(heads, cells) + units if cells else "") + _by_dataset(evaluations)


def _by_dataset(evaluations: Sequence[Row]) -> str:
    """The newest evaluation of a mixture, a row for each dataset."""
    newest = evaluations[-1] if evaluations else {}
    known = [
        name.removeprefix("held_out_").split("/", 1) for name in newest if name.startswith("held_out_") and "/" in name
    ]
    metrics, names = (list(dict.fromkeys(pair[at] for pair in known)) for at in range(2))
    cells = [(name, *(_cell(newest.get(f"held_out_{metric}/{name}")) for metric in metrics)) for name in names]
    heads = (f"dataset, step {newest.get('step')}", *(metric.replace("_", " ") for metric in metrics))
    return table(heads, cells) if cells else ""


def _robot(evaluations: Sequence[Row]) -> str:
    tried = [row for row in evaluations if "robot_success" in row or "robot_error" in row]
    steps = column(tried, "step")
    drawn = chart(
        [
            Curve("success at any time", steps, column(tried, "robot_success_any"), 0, "thick", dots=True),
            Curve("success at the end", steps, column(tried, "robot_success"), 2, dots=True),
        ],
        zero=True,
        one=True,
        height=170,
    )
    failed = [
        f'<p class="bad">step {row["step"]}: {escape(str(row["robot_error"])[:500])}</p>'
        for row in tried[-3:]
        if "robot_error" in row
    ]
    cells = [
        (
            str(row["step"]),
            *(_cell(row.get(f"robot_{name}")) for name in ("success", "success_any", "episodes", "seconds")),
        )
        for row in tried[-LAST:]
        if "robot_success" in row
    ]
    heads = ("step", "success at the end", "at any time", "episodes", "seconds with the export")
    return drawn + (table(heads, cells) if cells else "") + "".join(failed)


def _facts(run: Mapping[str, Any]) -> str:
    """Settings and facts of run.json, folded."""
    parts = []
    for title, content in run.items():
        leaves = list(_leaves(content)) if isinstance(content, dict) else [("", _cell(content))]
        told = TITLES.get(title, str(title))
        parts.append(f"<details><summary>{escape(told)}</summary>{table(('what', 'value'), leaves)}</details>")
    return "".join(parts)


def _leaves(content: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, str]]:
    for name, value in content.items():
        place = f"{where}, {name}" if where else str(name)
        if isinstance(value, dict) and value:
            yield from _leaves(value, place)
        else:
            yield place, _cell(value)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "not finite"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= LONG else text[:LONG] + "…"


def _columns(rows: Sequence[Row], prefix: str) -> list[str]:
    """Names of columns that begin so, in the order in which they come."""
    return list(dict.fromkeys(name for row in rows for name in row if name.startswith(prefix)))


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none: a page is made of what is there."""
    try:
        return read_object(path, CheckpointError)
    except CheckpointError:
        return {}


if __name__ == "__main__":
    from ki_edge.commands import run_command, show

    def _make() -> int:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".") / "training"
        if not folder.is_dir():
            raise CheckpointError(f"no folder at {folder}: expected the output of ki-train")
        show([f"written: {write_page(folder)}"])
        return 0

    sys.exit(run_command("ki_edge.train.watching.page", _make, "nothing was written"))
