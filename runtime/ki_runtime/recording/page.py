"""run.html: a recorded run to look at, one file that needs no network. Made from steps.jsonl and the films beside it.

python -m ki_runtime.recording.page DIR    makes it again, also of a run that was killed
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ki_edge.errors import RobotError
from ki_edge.files.writing import write_file

from .run_log import DRAWN, LOG, EpisodeLog, Float, RunLog
from .svg import BLUE, EDGE, MUTED, ORANGE, RED, Chart

__all__ = ["LOG", "PAGE", "to_html", "write_page"]
PAGE = "run.html"
EMBEDDED = 8_000_000  # bytes of films that are put into the page; others are shown from their files
CHUNKS = 60  # predicted chunks that are drawn of an episode
SAME = 1e-5  # of a number: a file rounds
OUTCOME = ("episode", "seed", "commands", "inferences", "seconds", "success", "at any time")
TYPES = {".mp4": "video/mp4", ".gif": "image/gif"}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d1d1f; max-width: 860px; margin: 2.5em auto; padding: 0 1em; }
h1 { font-size: 1.6em; margin-bottom: 0.2em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; font-size: 0.92em; }
th, td { text-align: left; padding: 0.3em 1.2em 0.3em 0; border-bottom: 1px solid #e3e3e6; }
td { font-variant-numeric: tabular-nums; }
video, img { max-width: 420px; width: 100%; display: block; margin: 0.8em 0; } svg { width: 100%; display: block; }
.note { color: #5f5f66; font-size: 0.92em; } .wide { overflow-x: auto; }
details { margin-top: 1em; } summary { cursor: pointer; font-weight: 600; }
i.k { display: inline-block; width: 1.6em; height: 0; vertical-align: middle; margin: 0 0.4em 0 0; }
span.k { margin-right: 1.3em; }
"""


def write_page(folder: Path) -> Path:
    """Write run.html into the folder of a recorded run. DatasetError without its log, RobotError if it is read-only."""
    page = folder / PAGE
    write_file(page, to_html(RunLog.read(folder), folder), RobotError)
    return page


def to_html(log: RunLog, folder: Path) -> str:
    """The page. Films are read from `folder`."""
    robot = str(log.episodes[0].start.get("robot")) if log.episodes else "no robot"
    films = _Films(folder)
    drawn = "".join(_episode(episode, films) for episode in log.episodes[:DRAWN])
    more = len(log.episodes) - DRAWN
    rest = f'<p class="note">{more} more episodes are in {LOG} and in the dataset.</p>' if more > 0 else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Run of {escape(robot)}</title><style>{STYLE}</style></head><body>
<h1>Run of {escape(robot)}</h1>
<p>{escape(_summary(log))}</p>
<h2>Latency, ticks, seams, guards</h2>
<div class="wide">{_table(("milliseconds", "count", "p50", "p95", "p99", "max"), _latencies(log))}</div>
<p class="note">From one command to the next is what really passed on the loop's clock. Seams: the largest change of one
number of an action from a command to the next, in robot units, where a chunk (or a hold) begins and elsewhere.</p>
<div class="wide">{_table(("change of an action", "count", "p50", "p95", "p99", "max"), _seams(log))}</div>
<p>{escape(_guards(log))}</p>
<h2>Episodes</h2>
<div class="wide">{_table(OUTCOME, _outcomes(log))}</div>
{drawn}{rest}
</body></html>
"""


class _Films:
    """The films beside the page, in it while there is room."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._left = folder, EMBEDDED

    def show(self, index: int) -> str:
        """The film of an episode as HTML; "" without one."""
        for suffix, kind in TYPES.items():
            path = self._folder / f"episode_{index:03d}{suffix}"
            if not path.is_file():
                continue
            size = path.stat().st_size
            source = path.name
            if size <= self._left:
                self._left -= size
                source = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
            if suffix == ".gif":
                return f'<img alt="film of episode {index}" src="{source}">'
            return f'<video controls loop muted playsinline src="{source}"></video>'
        return ""


def _summary(log: RunLog) -> str:
    ended = [episode.end.get("success") for episode in log.episodes]
    known = [bool(success) for success in ended if success is not None]
    success = f", {sum(known)} of {len(known)} successful at their end" if known else ""
    rate = next((episode.start["rate"] for episode in log.episodes if episode.start.get("rate")), None)
    at = f" at {rate:g} a second" if isinstance(rate, int | float) else ""
    stopped = sum(not episode.end for episode in log.episodes)
    cut = f"; {stopped} stopped before its end" if stopped else ""
    count = f"{len(log.episodes)} episode{'s' * (len(log.episodes) != 1)}"
    return f"{count}{success}; {sum(e.count for e in log.episodes)} commands{at}{cut}."


def _latencies(log: RunLog) -> Iterator[Sequence[str]]:
    for stage, values in log.timings.items():
        yield stage.removesuffix("_ms"), *_figures(values)
    if log.late:
        yield "from one command to the next", *_figures(log.late)


def _seams(log: RunLog) -> Iterator[Sequence[str]]:
    for name, values in (("at seams", log.seams), ("inside chunks", log.inside)):
        if values:
            yield name, *_figures(values)


def _figures(values: Sequence[float]) -> list[str]:
    found = np.percentile(values, (50, 95, 99, 100))
    return [str(len(values)), *(f"{value:.3g}" for value in found)]


def _guards(log: RunLog) -> str:
    if not log.guards:
        return "The guards changed nothing."
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(log.guards.items()))
    return f"Commands that the guards changed or held back, by rule: {kinds}. They are the red dots below."


def _outcomes(log: RunLog) -> Iterator[Sequence[str]]:
    for episode in log.episodes:
        end = episode.end
        seconds = f"{end['seconds']:.2f}" if "seconds" in end else "stopped"
        words = [_yes(end.get("success")), _yes(end.get("success_any"))]
        yield (
            str(episode.index),
            str(episode.start.get("seed")),
            str(episode.count),
            str(end.get("inferences", "")),
            seconds,
            *words,
        )


def _yes(success: object) -> str:
    return "not known" if success is None else "yes" if success else "no"


def _episode(episode: EpisodeLog, films: _Films) -> str:
    """Film and curves of one episode; those after the first are folded."""
    name = f"Episode {episode.index}, seed {episode.start.get('seed')}"
    if not episode.steps:
        return f"<p>{escape(name)}: no command was sent.</p>"
    left = (
        f"<p class='note'>The first {len(episode.steps)} of {episode.count} commands.</p>"
        if episode.count > len(episode.steps)
        else ""
    )
    body = "".join(
        [films.show(episode.index), left, _legend(episode), *_action_charts(episode), *_time_charts(episode)]
    )
    return f"<details{' open' if episode.index == 0 else ''}><summary>{escape(name)}</summary>{body}</details>"


def _legend(episode: EpisodeLog) -> str:
    keys = [("sent", BLUE), ("predicted by each chunk", ORANGE), ("a chunk or a hold begins", EDGE), ("guards", RED)]
    if episode.start.get("recorded"):
        keys.append(("recorded", MUTED))
    lines = "".join(
        f'<span class="k"><i class="k" style="border-top:3px solid {colour}"></i>{words}</span>'
        for words, colour in keys
    )
    return f'<p class="note">{lines}</p>'


def _action_charts(episode: EpisodeLog) -> Iterator[str]:
    ticks, actions = episode.column("step"), episode.actions()
    span = (float(ticks[0]), float(ticks[-1]))
    names = episode.start.get("names") or [f"action {dim}" for dim in range(actions.shape[1])]
    seams = [float(step["step"]) for step in episode.steps if step.get("seam")]
    guarded = [(at, step) for at, step in enumerate(episode.steps) if step.get("guards")]
    recorded = np.array(episode.start.get("recorded") or np.zeros((0, actions.shape[1])), np.float64)
    every = -(-len(episode.chunks) // CHUNKS) or 1
    played = {step["chunk"]: step["step"] - step["index"] for step in episode.steps if step.get("chunk") is not None}
    chunks = [_chunk(episode.chunks[at], played.get(at), span) for at in range(0, len(episode.chunks), every)]
    for dim in range(actions.shape[1]):
        values = [actions[:, dim], *(rows[:, dim] for _, rows in chunks), recorded[:, dim]]
        chart = Chart(str(names[dim]), span, values)
        chart.lines(seams)
        if len(recorded):
            chart.curve(np.arange(len(recorded), dtype=np.float64), recorded[:, dim], MUTED, 2.4)
        for x, rows in chunks:
            chart.curve(x, rows[:, dim], ORANGE, 0.8, dashed=True)
        chart.curve(ticks, actions[:, dim], BLUE)
        chart.marks([(ticks[at], actions[at, dim], _words(step)) for at, step in guarded if dim in _changed(step)])
        yield chart.to_svg(axis="command" if dim == actions.shape[1] - 1 else "")


def _chunk(chunk: Mapping[str, object], played: float | None, span: tuple[float, float]) -> tuple[Float, Float]:
    """Ticks [n] and actions [n, a] of a predicted chunk within the episode.

    Row 0 is of the tick `played`: while a robot holds still, also for its first chunk, no row passes. None of a chunk
    that came too late: of the tick before which it was observed.
    """
    rows = np.array(chunk["actions"], np.float64)
    ticks = np.arange(len(rows), dtype=np.float64) + float(str(chunk["step"]) if played is None else played)
    there = (span[0] <= ticks) & (ticks <= span[1])
    return ticks[there], rows[there]


def _changed(step: Mapping[str, Any]) -> set[int]:
    """The numbers of a command that the guards changed; all, where none was or nothing else was planned."""
    sent, planned = np.array(step["action"], np.float64), step.get("planned")
    apart = np.zeros(len(sent)) if planned is None else np.abs(sent - np.array(planned, np.float64))
    found = np.flatnonzero(apart > SAME * np.maximum(1.0, np.abs(sent)))
    return set((found if len(found) else np.arange(len(sent))).tolist())


def _words(step: Mapping[str, object]) -> str:
    return f"command {step['step']}: {', '.join(map(str, step['guards']))}"  # type: ignore[call-overload]


def _time_charts(episode: EpisodeLog) -> Iterator[str]:
    """Row of the chunk, age of the observation, time from one command to the next."""
    ticks, time = episode.column("step"), episode.column("time")
    span = (float(ticks[0]), float(ticks[-1]))
    curves = (
        ("row of the chunk", episode.column("index")),
        ("age of the observation, ms", 1e3 * episode.column("age")),
        ("from the command before, ms", 1e3 * np.diff(time, prepend=np.nan)),
    )
    for at, (label, values) in enumerate(curves):
        chart = Chart(label, span, [values], height=84)
        chart.curve(ticks, values, BLUE, 1.0)
        yield chart.to_svg(axis="command" if at == len(curves) - 1 and not episode.checks else "")
    if episode.checks:
        yield _check_chart(episode, span)


def _check_chart(episode: EpisodeLog, span: tuple[float, float]) -> str:
    """How far the policy's heads were apart; a dot where that was beyond the limit or FAST said no actions."""
    first, last = span  # an observation may lie before the first command
    found = [
        (min(max(float(check["step"]), first), last), check["disagreement"], check["beyond"])
        for check in episode.checks
    ]
    there = np.array([(at, apart) for at, apart, _ in found if apart is not None], np.float64).reshape(-1, 2)
    chart = Chart("disagreement of the two heads", span, [there[:, 1]], height=84)
    chart.curve(there[:, 0], there[:, 1], BLUE, 1.0)
    top = float(there[:, 1].max(initial=0.0))
    chart.marks(
        [
            (
                at,
                top if apart is None else apart,
                "no actions in FAST" if apart is None else f"disagreement {apart:.3f}",
            )
            for at, apart, beyond in found
            if beyond or apart is None
        ]
    )
    return chart.to_svg(axis="command")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>{body}</table>"


if __name__ == "__main__":
    from ki_edge.commands import run_command, show

    def _make() -> int:
        show([f"written: {write_page(Path(sys.argv[1] if len(sys.argv) > 1 else '.'))}"])
        return 0

    sys.exit(run_command("ki_runtime.recording.page", _make, "nothing was written"))
