"""parity.json for machines and parity.html for people: one self-contained page with tables and pictures."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from ki_edge.bundle import Bundle
from ki_edge.dtypes import LOW_PRECISIONS
from ki_edge.errors import ExportError
from ki_edge.files.writing import write_file
from ki_export.precision import low_report, ranges_report
from ki_export.source.provenance import tool_versions

from .bars import CHANGED, COSINE, MAX_ABS, Bar, Measurement
from .comparison import Comparison
from .headline import ACTIONS, actions_error, in_words
from .pictures import pictures
from .traces import robot_traces

MEASURES = {MAX_ABS: "largest difference", COSINE: "1 - cosine", CHANGED: "share of tokens that differ"}
EXACT = {"times": "equality", "prefix_mask": "equality", "greedy_ids": "equality", "changed_weights": "count"}
BAR = (
    "A bar is the largest error that is allowed. Every tensor has one, set from what rounding does in this precision; "
    "beyond it more is wrong than rounding. Actions are normalised here, to a range from about -1 to 1."
)
DEPLOY = (
    "Yes: it computes the actions of its checkpoint, as closely as {precision} can. How good these are, only trials on "
    "the robot tell{more}. Another engine or device is checked once more, with the witness in the bundle, before the "
    "first action."
)
LONG = 50  # characters of a table cell from which on it is broken into lines
UNSURE = ("int8", *LOW_PRECISIONS.values())  # precisions whose actions differ visibly
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d1d1f; max-width: 860px; margin: 2.5em auto; padding: 0 1em; }
h1 { font-size: 1.6em; margin-bottom: 0.2em; } h2 { font-size: 1.15em; margin-top: 2em; }
.verdict { display: inline-block; padding: 0.15em 0.7em; border-radius: 1em; color: #fff; font-weight: 600; }
.pass { background: #1b7f3b; } .fail { background: #b3261e; }
table { border-collapse: collapse; width: 100%; font-size: 0.92em; }
th, td { text-align: left; padding: 0.3em 0.7em 0.3em 0; border-bottom: 1px solid #e3e3e6; vertical-align: top; }
td.n { font-variant-numeric: tabular-nums; white-space: nowrap; } tr.bad td { color: #b3261e; font-weight: 600; }
figure { margin: 1.2em 0; } img { max-width: 100%; } figcaption, .note { color: #5f5f66; font-size: 0.92em; }
.wide { overflow-x: auto; }
details { margin-top: 1em; } summary { cursor: pointer; }
"""


def to_json(comparison: Comparison, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that was compared, as JSON values."""
    actions = actions_error(comparison.measurements)
    return {
        "verified": not comparison.failures,
        "reference": comparison.reference,
        "precision": comparison.precision,
        "method": comparison.method,
        **facts,
        "actions": None if actions is None else _finite(actions),
        "worst": _plain(comparison.worst),
        "bars": {name: asdict(bar) for name, bar in comparison.bars.items()},
        "cases": comparison.cases,
        "measurements": [_plain(m) for m in comparison.measurements],
    }


def _plain(m: Measurement) -> dict[str, Any]:
    return _finite({**asdict(m), "passed": m.passed})


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: they become strings."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def write_report(folder: Path, comparison: Comparison, bundle: Bundle) -> None:
    """Write parity.json and parity.html into a folder."""
    facts = {"provenance": bundle.manifest.provenance, "sampling": bundle.manifest.sampling, "tools": tool_versions()}
    text = json.dumps(to_json(comparison, facts), indent=1, ensure_ascii=False)
    write_file(folder / "parity.json", text + "\n", ExportError)
    write_file(folder / "parity.html", to_html(comparison, facts, bundle), ExportError)


def to_html(comparison: Comparison, facts: Mapping[str, Any], bundle: Bundle) -> str:
    """The page. BundleError or ContractError if the bundle's audit or statistics are damaged."""
    failed = len(comparison.failures)
    verdict = ("fail", f"{failed} bars failed") if failed else ("pass", "all bars held")
    traces = None if comparison.traces is None else robot_traces(bundle, *comparison.traces)
    figures = "".join(_figure(caption, png) for caption, png in pictures(comparison, traces))
    actions = actions_error(comparison.measurements)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Parity report</title><style>{STYLE}</style></head><body>
<h1>Parity report: bundle of {escape(str(bundle.manifest.provenance.get("checkpoint")))}</h1>
<p><span class="verdict {verdict[0]}">{verdict[1]}</span> {escape("" if actions is None else in_words(actions))}</p>
<p>{BAR}</p>
<p><b>May I deploy this bundle?</b> {escape(_advice(comparison))}</p>
<p class="note">{len(comparison.measurements)} comparisons with {escape(comparison.reference)},
{len(comparison.cases)} cases. Closest to its bar: {escape(_closest(comparison.worst))}.</p>
<h2>Largest error of each tensor</h2>
{_summary_table(comparison.measurements)}
<h2>Pictures</h2>
{figures}
{_ranges(ranges_report.read_ranges(bundle.path))}<h2>Cases</h2>
{_table(("case", "batch", "cameras", "prompt tokens", "steps"), (_case_row(case) for case in comparison.cases))}
<h2>Bars</h2>
{_table(("tensor", "allowed", "measure", "reason"), (_bar_row(n, b) for n, b in comparison.bars.items()))}
<h2>Where it comes from</h2>
{_table(("what", "value"), _facts({**facts["provenance"], "sampling": facts["sampling"], "made with": facts["tools"]}))}
<details><summary>All comparisons</summary>
{_table(("case", "where", "measure", "error", "allowed"), map(_row, comparison.measurements))}
</details>
</body></html>
"""


def _advice(comparison: Comparison) -> str:
    if comparison.failures:
        return f"No. {comparison.explanation or 'An error is larger than its bar.'}"
    more = f", and in {comparison.precision} they differ visibly: measure its success before you rely on it"
    return DEPLOY.format(precision=comparison.precision, more=more if comparison.precision in UNSURE else "")


def _closest(m: Measurement) -> str:
    measure, error, allowed = _figures(m)
    return f"{m.where}, {measure} {error}, allowed {allowed} ({m.case})"


def _figure(caption: str, png: bytes) -> str:
    image = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{image}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _low_bits(found: ranges_report.Found) -> str:
    low = low_report.findings(found)
    if low is None:
        return ""
    columns = ("layer", "its products", "error of their results", "of the actions, alone", "cosine", "MB saved")
    layers = _table(columns, low_report.layers(low))
    head = ("more bits for", "bits", "smallest cosine of the actions")
    return (
        f"<h2>Eight and four bits</h2>\n<p>{escape(low_report.summary(low))}</p>\n"
        f"{_figure('How far the actions are off after each denoise step', low_report.picture(low))}\n"
        f"<h3>What more bits for the costliest layers buy</h3>\n{_table(head, low_report.bought(low))}\n"
        f"<h3>Error by layer</h3>\n<p>L2, relative. Layers are tried alone only where the budget does not hold with "
        f"all of them low, or with --sensitivity.</p>\n{layers}\n"
    )


def _ranges(found: ranges_report.Found | None) -> str:
    if found is None:
        return ""
    sensitivity = _low_bits(found)
    if costs := list(ranges_report.costs(found)):
        columns = ("in 16 bits alone", "largest error of the actions", "relative", "MB more in float32")
        sensitivity += f"<h2>Sensitivity</h2>\n{_table(columns, costs)}\n"
    if "ranges" not in found:
        return sensitivity
    head = ("product", "graph", "operand", "result", "weight", "headroom", "what was done")
    picture = _figure("Largest values by layer", ranges_report.picture(found))
    table = _table(head, ranges_report.rows(found))
    return f"<h2>Range audit</h2>\n<p>{escape(ranges_report.summary(found))}</p>\n{picture}\n{table}\n{sensitivity}"


def _summary_table(measurements: Sequence[Measurement]) -> str:
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for m in sorted(measurements, key=lambda m: m.tensor not in ACTIONS):  # what a robot gets stands first
        groups.setdefault((m.graph, m.tensor), []).append(m)
    worst = [max(group, key=lambda m: m.severity) for group in groups.values()]
    both = any(m.metric == COSINE for m in worst)  # else the largest difference is the error itself
    rows = []
    for m, group in zip(worst, groups.values(), strict=True):
        exact = m.tensor in EXACT
        sizes = ([f"{m.max_abs:.2e}"] if both else []) + [f"{m.magnitude:.3g}"]
        sizes = ["" for _ in sizes] if exact else sizes
        rows.append((_mark(m) + m.graph, m.tensor, *_figures(m), *sizes, str(len(group))))
    more = ("largest difference",) if both else ()
    return _table(("graph", "tensor", "measure", "error", "allowed", *more, "largest value", "comparisons"), rows)


def _figures(m: Measurement) -> tuple[str, str, str]:
    """Measure, error and bar."""
    if m.tensor in EXACT and m.metric == MAX_ABS:
        if EXACT[m.tensor] == "count":
            return "number that differ", f"{m.error:.0f}", "0"
        return "equality", "differs" if m.error else "equal", "equal"
    return MEASURES[m.metric], f"{m.error:.2e}", f"{m.limit:.2e}"


def _mark(m: Measurement) -> str:
    return "" if m.passed else "!"


def _row(m: Measurement) -> tuple[str, ...]:
    return (_mark(m) + m.case, m.where, *_figures(m))


def _case_row(case: Mapping[str, Any]) -> tuple[str, ...]:
    cells = (case[key] for key in ("name", "batch", "cameras", "prompt_tokens", "num_steps"))
    return tuple(", ".join(map(str, cell)) if isinstance(cell, list) else str(cell) for cell in cells)


def _bar_row(name: str, bar: Bar) -> tuple[str, ...]:
    if not bar.limit:
        return name, "0", "number that differ" if EXACT.get(name) == "count" else "equality", bar.reason
    scaled = " x largest value, if above 1" if bar.scaled else ""
    return name, f"{bar.limit:.0e}{scaled}", MEASURES[bar.metric], bar.reason


def _facts(facts: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, str]]:
    """(name, value) of every leaf; contract fields that come from one place share a line."""
    for key, value in facts.items():
        where = f"{name}, {key}" if name else str(key)
        if isinstance(value, Mapping) and key == "contract":
            for origin in dict.fromkeys(map(str, value.values())):
                yield (
                    f"{where}, from {origin}",
                    ", ".join(field for field, given in value.items() if str(given) == origin),
                )
        elif isinstance(value, Mapping):
            yield from _facts(value, where)
        else:
            yield where, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """HTML table; a row whose first cell starts with "!" is marked as failed."""
    lines = ['<div class="wide"><table><tr>' + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    for row in rows:
        mark = ' class="bad"' if row and row[0].startswith("!") else ""
        texts = (escape(str(cell).removeprefix("!")) for cell in row)
        cells = "".join(f"<td{'' if len(text) > LONG else ' class=n'}>{text}</td>" for text in texts)
        lines.append(f"<tr{mark}>{cells}</tr>")
    return "\n".join(lines) + "</table></div>"
