"""Everything that is measured on a GPU, in one go: parity, latency by stage, memory, share of the roofline.

    python benchmarks/gpu.py --plan                     what would be done, and in which order
    python benchmarks/gpu.py --minutes 10 --output build/gpu
    python benchmarks/gpu.py --wheels wheels/ ...       without network: installs these wheels beside the working tree
    python benchmarks/gpu.py --floor                    the least times that known devices allow, as a table
    python benchmarks/gpu.py --rehearse                 the same steps on the CPU with a tiny model

Needs Python with torch, onnx, onnxscript and onnxruntime-gpu; TensorRT and TensorRT-RTX are measured where they can be
imported. Nothing has to be installed of this project. What is done first matters most; what the budget of minutes does
not allow is skipped, and the report says so. After every step gpu.json is written, at the end gpu.md, a section for
docs/gpu.md. Without a GPU nothing is done (exit status 2).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in (".", "export", "runtime")]  # works where nothing is installed

from boards import device_of, floor, floors, markdown  # noqa: E402
from gpu_steps import PRECISIONS, Benchmark  # noqa: E402

from ki_edge import commands  # noqa: E402
from ki_edge.errors import ArgumentError, BackendError  # noqa: E402


def require_gpu() -> None:
    """BackendError in one line where there is none."""
    from ki_runtime.doctor.gpu import check_gpu
    from ki_runtime.doctor.host import Host

    gpu, finding = check_gpu(Host())
    if gpu is None:
        raise BackendError(
            f"GPU {finding.text}: {finding.fix}; --rehearse runs the steps on the CPU, --plan prints them"
        )


def _run(options: argparse.Namespace) -> int:
    if options.floor:
        print("\n".join(floors()))
        return 0
    benchmark = Benchmark(options, "cpu" if options.rehearse else "cuda")
    if options.plan:
        print(f"within {options.minutes:g} minutes, each step if the seconds in front of it are left:")
        print("\n".join(f"{plan.least:5.0f}  {plan.name:50} {plan.what}" for plan in benchmark.plan()))
        return 0
    for folder in (options.wheels, options.checkpoint):
        if folder is not None and not folder.is_dir():
            raise ArgumentError(f"no folder at {folder}")
    if not options.rehearse:
        require_gpu()
    options.output.mkdir(parents=True, exist_ok=True)
    results, records = benchmark.run()
    gpu = results.get("environment", {}).get("gpu") or "no GPU"
    text = "\n".join(section(gpu, results, records, rehearsal=options.rehearse))
    (options.output / "gpu.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


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


def _parser() -> commands.Parser:
    parser = commands.Parser(prog="gpu.py", description="Parity, latency, memory and share of the roofline on a GPU.")
    add = parser.add_argument
    add("--minutes", type=float, default=10.0, help="budget; what does not fit is skipped (%(default)s)")
    add("--output", type=Path, default=ROOT / "build" / "gpu", metavar="DIR", help="for gpu.json, gpu.md and all files")
    add("--checkpoint", type=Path, metavar="DIR", help="full-size checkpoint instead of random weights")
    add("--wheels", type=Path, metavar="DIR", help="wheels to install first, without network")
    add("--precisions", type=_names(PRECISIONS), default=PRECISIONS, metavar="NAME,...", help="the first one is timed")
    add("--rounds", type=int, default=30, metavar="N", help="measurements of each contender (%(default)s)")
    add("--observations", type=int, default=20, metavar="N", help="of parity (%(default)s)")
    add("--compile-mode", default="max-autotune", metavar="MODE", help="of torch.compile, or none (%(default)s)")
    add("--plan", action="store_true", help="print the steps and end")
    add("--floor", action="store_true", help="print the roofline's table and end")
    add("--rehearse", action="store_true", help="run the steps on the CPU with a tiny model; its numbers mean nothing")
    return parser


def _names(known: tuple[str, ...]) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if not set(names) <= set(known):
            raise argparse.ArgumentTypeError(f"'{text}', expected some of {','.join(known)}")
        return names

    return parse


if __name__ == "__main__":
    arguments = _parser().parse_args()
    sys.exit(commands.run_command("gpu.py", lambda: _run(arguments), "gpu.json has what was measured"))
