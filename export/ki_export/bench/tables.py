"""A report for people: lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .process import Memory
from .report import INFERENCE, PREFIX, Report


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they must be; the first to the left, the others to the right."""
    widths = [max(len(row[at]) for row in (head, *rows)) for at in range(len(head))]
    lines = []
    for row in (head, *rows):
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join((row[0].ljust(widths[0]), *cells)).rstrip())
    return lines


def lines(report: Report) -> Iterator[str]:
    """The whole report."""
    yield ", ".join(f"{name} {value}" for name, value in report.machine.items())
    model = report.model
    yield (
        f"{report.bundle}: {report.precision}, {model['layers']} layers of width {model['width']}, "
        f"horizon {model['horizon']}; backend {report.backend}, {report.threads} threads, {report.rounds} rounds"
    )
    runs = [warm_up.runs for warm_up in report.warm_up.values()]
    yield f"warm-up: {report.warm_up_policy}; here {min(runs)} to {max(runs)} runs"
    yield ""
    yield from _stages(report)
    yield from _above(report)
    yield from _pictures(report)
    yield ""
    yield from _curve(report)
    yield from _peaks(report)
    yield from _process(report)
    yield from _side_by_side(report)
    if report.other_load is not None:
        yield f"others used {100 * report.other_load:.1f} % of the CPU while the times were taken"
    yield from (f"warning: {warning}" for warning in report.warnings)


def _stages(report: Report) -> list[str]:
    head = ("ms", "cameras", "prompt", "steps", "p50", "p90", "p99", "GFLOP", "MB", "GFLOP/s", "limit", "by", "reached")
    rows = []
    for stage in report.stages:
        case, time = stage.case, stage.time
        steps = str(case.steps) if stage.name == INFERENCE else ""
        times = [f"{value:.2f}" for value in (time.p50, time.p90, time.p99)]
        work = [f"{sum(stage.flops.values()) / 1e9:.2f}", f"{stage.bytes / 1e6:.1f}", f"{stage.gflops:.0f}"]
        limit = [f"{stage.limit_ms:.2f}", stage.limited_by, f"{100 * stage.reached:.0f} %"]
        rows.append((stage.name, str(case.cameras), str(case.tokens), steps, *times, *work, *limit))
    return table(head, rows)


def _above(report: Report) -> Iterator[str]:
    """Why a stage can be faster than its limit; nothing if none was. A limit of another engine is warned of."""
    stages = report.stages if report.backend == "ort" else ()
    above = {stage.limited_by for stage in stages if round(100 * stage.reached) > 100}
    if "memory" in above:
        yield "above 100 % by memory: from the processor's caches, which hold what such a stage reads again at once"
    if above - {"memory"}:
        yield "above 100 % by compute: the products that the limit is taken from were slower in these rounds"


def _pictures(report: Report) -> Iterator[str]:
    if report.pictures is not None:
        found, model = report.pictures, report.main[2].time.p50
        size, time = "x".join(map(str, found.size)), found.time
        yield (
            f"before the model: {found.cameras} pictures of {size} resized: p50 {time.p50:.2f}, p90 {time.p90:.2f}, "
            f"p99 {time.p99:.2f} ms; {100 * time.p50 / (time.p50 + model):.0f} % of both together"
        )


def _curve(report: Report) -> Iterator[str]:
    """What each further prefix token costs, in time and in operations; nothing if only one size was measured."""
    sizes = {stage.tokens: stage for stage in report.stages if stage.name == PREFIX}
    if len(sizes) < 2:
        return
    rows = []
    for tokens, stage in sorted(sizes.items()):
        case, work = stage.case, sum(stage.flops.values())
        rows.append(
            (
                f"{tokens} (cameras {case.cameras}, prompt {case.tokens})",
                f"{stage.time.p50:.2f}",
                f"{1e3 * stage.time.p50 / tokens:.1f}",
                f"{work / 1e9 / tokens:.3f}",
                f"{stage.gflops:.0f}",
            )
        )
    yield from table(("prefix tokens", "p50 ms", "µs a token", "GFLOP a token", "GFLOP/s"), rows)
    yield ""


def _peaks(report: Report) -> Iterator[str]:
    rows = []
    for rate in report.peaks.measured:
        p = rate.product
        rows.append(
            (f"{p.kind} {p.m} x {p.k} x {p.n}", "prepacked" if rate.prepacked else "as stored", f"{rate.gflops:.0f}")
        )
    yield from table(("products of this engine", "weights", "GFLOP/s"), rows)
    peaks = ", ".join(f"{kind} {value:.0f} GFLOP/s" for kind, value in report.peaks.gflops.items())
    yield f"peak: {peaks}; memory {report.peaks.bandwidth:.1f} GB/s (reading)"
    yield ""


def _process(report: Report) -> Iterator[str]:
    start = report.startup
    yield f"a fresh process: load {start.load_s:.2f} s, first action {start.first_action_s:.2f} s after it began"
    if report.memory is not None:
        m = report.memory
        yield (
            f"its memory: {m.rss_peak / 1e6:.0f} MB resident at the peak, {m.anonymous_peak / 1e6:.0f} MB of it not "
            f"from files; weights that acting needs {m.weights / 1e6:.0f} MB"
        )
    yield ""


def _side_by_side(report: Report) -> Iterator[str]:
    """The bundle and what it was compared with; nothing if it was measured alone."""
    if not report.others:
        return
    prefix, step, inference = report.main[:3]
    case, memory = inference.case, report.memory
    own = [prefix.time.p50, case.steps * step.time.p50, inference.time.p50]
    rows = [(report.bundle, report.backend, report.precision, str(prefix.tokens), *_ms(own), "1", "", "", _mb(memory))]
    for x in report.others:
        times, spread = [x.prefix.p50, x.denoise.p50, x.total.p50], f"{x.ratio.least:.2f} to {x.ratio.most:.2f}"
        difference = "other model" if x.max_abs_difference is None else f"{x.max_abs_difference:.1e}"
        ratio = (f"{x.ratio.p50:.2f}", spread, difference, _mb(x.memory))
        rows.append((x.name, x.engine, x.precision, str(x.tokens), *_ms(times), *ratio))
    yield f"side by side, in the same rounds: cameras {case.cameras}, prompt {case.tokens}, {case.steps} steps; p50 ms"
    head = ("", "runs on", "precision", "tokens", "prefix", "denoise", "total", "times the first's", "in single rounds")
    yield from table((*head, "max |difference|", "peak MB"), rows)
    yield ""


def _ms(values: Sequence[float]) -> list[str]:
    return [f"{value:.1f}" for value in values]


def _mb(memory: Memory | None) -> str:
    return "" if memory is None else f"{memory.rss_peak / 1e6:.0f}"
