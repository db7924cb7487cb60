"""parity.json for machines and parity.html for people: one self-contained page with tables and pictures."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from ki_edge.errors import ExportError
from ki_edge.files.writing import write_file
from ki_export.precision import ranges_report

from .bars import MAX_ABS, Bar, Measurement
from .comparison import Comparison
from .pictures import pictures

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d1d1f; max-width: 860px; margin: 2.5em auto; padding: 0 1em; }
h1 { font-size: 1.6em; margin-bottom: 0.2em; } h2 { font-size: 1.15em; margin-top: 2em; }
.verdict { display: inline-block; padding: 0.15em 0.7em; border-radius: 1em; color: #fff; font-weight: 600; }
.pass { background: #1b7f3b; } .fail { background: #b3261e; }
table { border-collapse: collapse; width: 100%; font-size: 0.92em; }
th, td { text-align: left; padding: 0.3em 0.7em 0.3em 0; border-bottom: 1px solid #e3e3e6; vertical-align: top; }
td.n { font-variant-numeric: tabular-nums; white-space: nowrap; } tr.bad td { color: #b3261e; font-weight: 600; }
figure { margin: 1.2em 0; } img { max-width: 100%; } figcaption, .note { color: #5f5f66; font-size: 0.92em; }
details { margin-top: 1em; } summary { cursor: pointer; }
"""


def to_json(comparison: Comparison, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that was compared, as JSON values."""
    return {
        "verified": not comparison.failures,
        "reference": comparison.reference,
        "precision": comparison.precision,
        "method": comparison.method,
        **facts,
        "worst": _plain(comparison.worst),
        "bars": {name: asdict(bar) for name, bar in comparison.bars.items()},
        "cases": comparison.cases,
        "measurements": [_plain(m) for m in comparison.measurements],
    }


def _plain(m: Measurement) -> dict[str, Any]:
    """JSON has no NaN and no infinity: they become strings."""
    values = {**asdict(m), "passed": m.passed}
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def write_report(
    folder: Path, comparison: Comparison, facts: Mapping[str, Any], ranges: ranges_report.Found | None = None
) -> None:
    """Write parity.json and parity.html into a folder. `ranges`: the audit of a float16 bundle."""
    text = json.dumps(to_json(comparison, facts), indent=1, ensure_ascii=False)
    write_file(folder / "parity.json", text + "\n", ExportError)
    write_file(folder / "parity.html", to_html(comparison, facts, ranges), ExportError)


def to_html(comparison: Comparison, facts: Mapping[str, Any], ranges: ranges_report.Found | None = None) -> str:
    """The page. `ranges`: a float16 bundle's audit."""
    worst, failed = comparison.worst, len(comparison.failures)
    verdict = ("fail", f"{failed} bars failed") if failed else ("pass", "all bars held")
    figures = "".join(_figure(caption, png) for caption, png in pictures(comparison))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Parity report</title><style>{STYLE}</style></head><body>
<h1>Parity report</h1>
<p><span class="verdict {verdict[0]}">{verdict[1]}</span></p>
<p>{len(comparison.measurements)} comparisons with {escape(comparison.reference)} in {len(comparison.cases)} cases.
Closest to its bar: {escape(worst.where)}, {worst.metric} {worst.error:.2e} of {worst.limit:.2e}
({escape(worst.case)}).</p>
<h2>Worst error of each tensor</h2>
{_summary_table(comparison.measurements)}
<h2>Pictures</h2>
{figures}
{_ranges(ranges)}<h2>Cases</h2>
{_table(("case", "batch", "cameras", "prompt tokens", "steps"), (_case_row(case) for case in comparison.cases))}
<h2>Bars</h2>
{_table(("tensor", "bar", "reason"), ((n, _bar_text(b), b.reason) for n, b in comparison.bars.items()))}
<h2>Provenance</h2>
{_table(("what", "value"), ((name, json.dumps(value)) for name, value in facts.items()))}
<details><summary>All comparisons</summary>
{_table(("case", "where", "error", "bar"), map(_row, comparison.measurements))}
</details>
</body></html>
"""


def _figure(caption: str, png: bytes) -> str:
    image = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{image}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _ranges(found: ranges_report.Found | None) -> str:
    if found is None:
        return ""
    sensitivity = ""
    if costs := list(ranges_report.costs(found)):
        columns = ("in 16 bits alone", "largest error of the actions", "relative", "MB more in float32")
        sensitivity = f"<h2>Sensitivity</h2>\n{_table(columns, costs)}\n"
    if "ranges" not in found:
        return sensitivity
    head = ("product", "graph", "operand", "result", "weight", "headroom", "what was done")
    picture = _figure("Largest values by layer", ranges_report.picture(found))
    table = _table(head, ranges_report.rows(found))
    return f"<h2>Range audit</h2>\n<p>{escape(ranges_report.summary(found))}</p>\n{picture}\n{table}\n{sensitivity}"


def _summary_table(measurements: Sequence[Measurement]) -> str:
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for m in measurements:
        groups.setdefault((m.graph, m.tensor), []).append(m)
    rows = []
    for (graph, tensor), group in groups.items():
        m = max(group, key=lambda m: m.severity)
        mark, numbers = (
            "" if m.passed else "!",
            (f"{m.error:.2e}", f"{m.limit:.2e}", f"{m.max_abs:.2e}", f"{m.magnitude:.3g}"),
        )
        rows.append((mark + graph, tensor, *numbers, str(len(group))))
    return _table(("graph", "tensor", "error", "bar", "max abs error", "largest value", "comparisons"), rows)


def _row(m: Measurement) -> tuple[str, ...]:
    return ("" if m.passed else "!") + m.case, m.where, f"{m.error:.2e}", f"{m.limit:.2e}"


def _case_row(case: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(case[key]) for key in ("name", "batch", "cameras", "prompt_tokens", "num_steps"))


def _bar_text(bar: Bar) -> str:
    if not bar.limit:
        return "identical"
    metric = "" if bar.metric == MAX_ABS else f" {bar.metric}"
    return f"{bar.limit:.0e}{metric}" + (" x largest value, if above 1" if bar.scaled else "")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """HTML table; a row whose first cell starts with "!" is marked as failed."""
    lines = ["<table><tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    for row in rows:
        mark = ' class="bad"' if row and row[0].startswith("!") else ""
        cells = "".join(f'<td class="n">{escape(str(cell).removeprefix("!"))}</td>' for cell in row)
        lines.append(f"<tr{mark}>{cells}</tr>")
    return "\n".join(lines) + "</table>"
