"""A report as one picture: the stages against their limits, what prefix tokens cost, and others side by side."""

from __future__ import annotations

import io
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .report import INFERENCE, PREFIX, STEP, Report, Stage

LIMIT, MEASURED = "#1f4e79", "#9dc3e6"


def draw(report: Report) -> bytes:
    """PNG: bars of p50 against the limit in the main case; curves over prefix tokens if several sizes were measured;
    the bundle beside what it was compared with.
    """
    several = len({stage.tokens for stage in report.stages}) > 1
    panels = [_bars, *([_curves] if several else []), *([_side_by_side] if report.others else [])]
    figure = Figure(figsize=(0.4 + 5.3 * len(panels) + 0.7 * (len(panels) == 1), 3.9), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axes, report)
    model = report.model
    figure.suptitle(
        f"{report.bundle}: {report.precision}, {model['layers']} layers, {report.backend}, {report.threads} threads",
        fontsize=10,
    )
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()


def _bars(axes: Axes, report: Report) -> None:
    stages = [stage for stage in report.main if stage.name != STEP]
    steps = next(stage for stage in report.main if stage.name == STEP)
    count = steps.case.steps
    bars = [(stage.name, stage.time.p50, stage.limit_ms) for stage in stages]
    bars.insert(1, (f"{count} denoise steps", count * steps.time.p50, count * steps.limit_ms))
    if report.pictures is not None:
        bars.insert(0, (f"pictures {'x'.join(map(str, report.pictures.size))}", report.pictures.time.p50, 0.0))
    for at, (_, measured, limit) in enumerate(bars):
        axes.bar(at, measured, 0.62, color=MEASURED, label="measured, p50" if at == 0 else None)
        axes.bar(at, limit, 0.36, color=LIMIT, label="limit of this machine" if at == 0 else None)
        reached = f"{100 * limit / measured:.0f} %" if limit else f"{measured:.1f} ms"
        axes.annotate(reached, (at, max(measured, limit)), ha="center", va="bottom", fontsize=9)
    axes.set_xticks(range(len(bars)), [name.replace(" ", "\n", 1) for name, *_ in bars], fontsize=9)
    case = steps.case
    axes.set(ylabel="ms", title=f"cameras: {case.cameras}, prompt: {case.tokens} tokens; share of the limit reached")
    axes.title.set_fontsize(9)
    axes.margins(y=0.12)
    axes.legend(fontsize=8, frameon=False)


def _side_by_side(axes: Axes, report: Report) -> None:
    """A bar of prefix and denoising for each, the bundle's on top."""
    prefix, step = report.main[:2]
    rows = [(f"{report.bundle}\n{report.precision}", prefix.time.p50, step.case.steps * step.time.p50, "1")]
    for x in report.others:
        spread = f"{x.ratio.p50:.2f} ({x.ratio.least:.2f} to {x.ratio.most:.2f})"
        rows.append((f"{Path(x.name).name}\n{x.engine}, {x.precision}", x.prefix.p50, x.denoise.p50, spread))
    for at, (_, first, second, ratio) in enumerate(rows):
        axes.barh(at, first, 0.6, color=LIMIT, label="prefix" if at == 0 else None)
        axes.barh(at, second, 0.6, left=first, color=MEASURED, label="denoise" if at == 0 else None)
        axes.annotate(f" {ratio}", (first + second, at), va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=9)
    axes.invert_yaxis()
    axes.set(xlabel="ms, p50", title="side by side: times the first's (in single rounds)")
    axes.title.set_fontsize(9)
    axes.margins(x=0.35)
    axes.legend(fontsize=8, frameon=False)


def _curves(axes: Axes, report: Report) -> None:
    steps = report.stages[0].case.steps
    for name, style in ((INFERENCE, "s"), (PREFIX, "o")):
        stages = [stage for stage in report.stages if stage.name == name and stage.case.steps == steps]
        stages.sort(key=lambda stage: (stage.case.cameras, stage.tokens))
        for at, (cameras, group) in enumerate(groupby(stages, key=lambda stage: stage.case.cameras)):
            points: list[Stage] = list(group)
            tokens = [stage.tokens for stage in points]
            label = f"{name}, cameras: {cameras}"
            axes.plot(
                tokens, [stage.time.p50 for stage in points], style + "-", ms=4, lw=1.2, color=f"C{at}", label=label
            )
        stages.sort(key=lambda stage: stage.tokens)
        axes.plot(
            [stage.tokens for stage in stages],
            [stage.limit_ms for stage in stages],
            "--", lw=1, color=LIMIT, label="limits of this machine" if name == PREFIX else None,
        )  # fmt: skip
    axes.set(xlabel="prefix tokens", ylabel="ms, p50", title=f"{steps} steps")
    axes.title.set_fontsize(9)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, frameon=False)
