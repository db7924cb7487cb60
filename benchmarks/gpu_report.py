"""The GPU benchmark's results as a section of Markdown, and the table of what the hardware allows at best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ki_edge.config import PI05
from ki_export.source.devices import DEVICES, Device, floor_ms, stages

CASES = ((2, 30), (3, 200))  # cameras present, tokens of the prompt
STEPS = 10
Row = Sequence[str]


def markdown(head: Row, rows: Sequence[Row]) -> list[str]:
    """A table."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


def floors() -> list[str]:
    """Least time of an inference with 16-bit weights on known devices, by case and stage."""
    head = ["", "GB/s", "TFLOP/s", *(f"{cameras} cameras, {prompt} tokens" for cameras, prompt in CASES)]
    rows = []
    for device in DEVICES:
        cells = [_parts(device, cameras, prompt) for cameras, prompt in CASES]
        rows.append([device.name, f"{device.bandwidth:g}", f"{device.peak16:g}", *cells])
    return markdown(head, rows)


def floor(device: Device, cameras: int, prompt: int, steps: int = STEPS) -> dict[str, float]:
    """Milliseconds of each stage; `prefix` is the graph, vision tower and backbone, and `step` one of `denoise`."""
    vision, prefix, denoise = (
        floor_ms(stage, device, 2) for stage in stages(PI05, cameras=cameras, prompt=prompt, steps=steps)
    )
    return {"prefix": vision + prefix, "step": denoise / steps, "total": vision + prefix + denoise}


def device_of(gpu: str) -> Device | None:
    """The known device that a GPU's name holds ("NVIDIA H200" is an H200)."""
    words = gpu.lower().replace("-", " ").split()
    if "laptop" in words:
        return None  # of the same name and slower
    return next((device for device in DEVICES if set(device.name.lower().split()[-1:]) <= set(words)), None)


def section(gpu: str, results: Mapping[str, Any], records: Sequence[Any], *, rehearsal: bool) -> Iterator[str]:
    """Everything that was measured, for docs/gpu.md."""
    facts = results.get("environment", {})
    yield f"## {gpu}, {facts.get('date', '')}"
    yield ""
    if rehearsal:
        yield "**A rehearsal on a CPU with a tiny model: these numbers mean nothing.**"
        yield ""
    yield ", ".join(f"{name} {value}" for name, value in facts.items() if name != "date" and value)
    yield ""
    yield from _latency(gpu, results)
    yield from _parity(results)
    yield from _left_out(records)


def _latency(gpu: str, results: Mapping[str, Any]) -> Iterator[str]:
    device = device_of(gpu)
    for name, measured in results.items():
        if not name.startswith("latency"):
            continue
        best = floor(device, measured["cameras"], measured["tokens"]) if device is not None else None
        yield f"### {name[0].upper()}{name[1:]}: {measured['rounds']} rounds in turn, medians"
        yield ""
        rows = []
        for contender, times in measured["contenders"].items():
            share = f"{100 * best['total'] / times['total']:.0f} %" if best is not None else ""
            memory = measured["memory_mb"].get(contender)
            cells = [f"{times[key]:.2f}" for key in ("total", "p90", "prefix", "step")]
            rows.append([contender, *cells, share, f"{memory / 1e3:.1f}" if memory is not None else ""])
        head = ["ms", "inference, p50", "p90", "prefix", "denoise step", "floor / p50", "GPU memory, GB"]
        yield from markdown(head, rows)
        yield ""
        if best is not None:
            parts = ", ".join(f"{key} {value:.2f}" for key, value in best.items())
            yield f"Floor of the {device.name if device else ''} with 16-bit weights, ms: {parts}."
            yield ""


def _parity(results: Mapping[str, Any]) -> Iterator[str]:
    found = [row for name, rows in results.items() if name.startswith("parity") for row in rows]
    if not found:
        return
    yield "### Actions against the float32 PyTorch model"
    yield ""
    rows = [
        [
            row["model"],
            row["contender"],
            f"{row['cosine']:.8f}",
            f"{row['max_abs']:.1e}",
            f"{row['relative_l2']:.1e}",
            str(row["observations"]),
        ]
        for row in found
    ]
    yield from markdown(["model", "", "smallest cosine", "max abs", "relative L2", "observations"], rows)
    yield ""


def _left_out(records: Sequence[Any]) -> Iterator[str]:
    missing = [record for record in records if record.state != "done"]
    if not missing:
        return
    yield "Not measured:"
    yield ""
    for record in missing:
        yield f"- {record.name}: {record.state}, {record.note}"
    yield ""


def _parts(device: Device, cameras: int, prompt: int) -> str:
    best = floor(device, cameras, prompt)
    return f"{best['total']:.1f} = {best['prefix']:.1f} + {STEPS} x {best['step']:.2f}"
