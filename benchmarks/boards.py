"""What a full-size policy needs of boards and cards: memory to act and to build engines, and the least time.

    python benchmarks/boards.py
    python benchmarks/boards.py --precision float32 --tensorrt 10.13
    python benchmarks/boards.py --measure BUNDLE ...    (the peak on this machine's CPU, beside the estimate)

From the model's shapes, measured on no board: `ki_runtime.doctor.memory` counts what acting needs,
`ki_runtime.doctor.variants` in which ways a policy fits, and `ki_runtime.trt.memory` what a TensorRT of a version takes
to build; the boards are `ki_runtime.doctor.boards`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ki_edge.bundle import Bundle
from ki_edge.config import PI05
from ki_edge.dtypes import PRECISIONS
from ki_export.source.devices import DEVICES, Device, floor_ms, stages
from ki_runtime.doctor.boards import BOARDS, GB, find_board
from ki_runtime.doctor.memory import CAMERAS, PROMPT, WEIGHTS, Needs, needs
from ki_runtime.doctor.plan import FAST_ROWS, plan, tensorrt
from ki_runtime.doctor.variants import HEAD, rows
from ki_runtime.trt.api import Api
from ki_runtime.trt.memory import needed

MOST, SMALL = 64, 16  # GB of a board in the first table, and in those of all ways
CASES = ((2, 30), (3, 200))  # cameras present, tokens of the prompt
STEPS = 10
EVERY = "rtx-5090"  # computes in every precision
OTHERS = {"laptop", "pcie", "nvl", "mig", "d"}  # in the names of slower devices
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
    if OTHERS & set(words):
        return None  # of the same name and slower
    return next((device for device in DEVICES if _number(device) in words), None)


def _number(device: Device) -> str:
    """The word of a device's name that drivers write too."""
    return device.name.lower().removesuffix(" sxm").split()[-1]


def _parts(device: Device, cameras: int, prompt: int) -> str:
    best = floor(device, cameras, prompt)
    return f"{best['total']:.1f} = {best['prefix']:.1f} + {STEPS} x {best['step']:.2f}"


def graph_table(need: Needs, api: Api) -> list[str]:
    """A row a graph."""
    rows = [
        (name, *(f"{value / GB:.2f}" for value in (g.weights, g.activations, g.kv, needed(api, g.weights))))
        for name, g in need.graphs.items()
    ]
    return markdown(["GB", "weights = engine", "activations", "K/V", f"building, TensorRT {api.version_text}"], rows)


def board_table(need: Needs, api: Api) -> list[str]:
    """A row a board: what fits, and how much swap the build wants."""
    build = max(needed(api, graph.weights) for graph in need.graphs.values())
    rows = []
    for board in (board for board in BOARDS if board.shared and board.memory <= MOST):
        free = board.free
        swap = "as it is" if build <= free else f"with {(build - free) / GB:.0f} GB of swap"
        acting, fast = ("yes" if size <= free else "no" for size in (need.acting, need.with_fast))
        rows.append((f"{board.memory} GB", f"{free / GB:.1f}", acting, fast, swap if acting == "yes" else "no"))
    head = [
        "board", "free, GB", f"acts ({need.acting / GB:.1f} GB)", f"and FAST ({need.with_fast / GB:.1f} GB)",
        f"builds ({build / GB:.1f} GB)",
    ]  # fmt: skip
    return markdown(head, rows)


def small_boards() -> list[str]:
    """In which ways the full-size model fits each small board, how that adds up, and the commands of the best way."""
    found: list[str] = []
    for board in (board for board in BOARDS if board.shared and board.memory <= SMALL):
        told = plan(board, None)
        found += [
            "",
            f"{board.name}, {board.free / GB:.1f} GB free:",
            "",
            *markdown(HEAD, [*rows(board, told["variants"])]),
        ]
        for name, way in told["recommended"].items():
            commands = ["nothing fits"] if way is None else way["commands"]
            found += ["", f"{name.replace('_', ' ')}:", "", *(f"    {command}" for command in commands)]
    return found


def sums() -> list[str]:
    """How acting adds up in each precision, with the table in the graph."""
    ways = plan(find_board(EVERY), None)["variants"]
    whole = [way for way in ways if way["embeddings"] == "graph"]
    head = ["GB", *whole[0]["adds_up"], "acts"]
    cells = [
        [way["precision"], *(f"{size / GB:.2f}" for size in (*way["adds_up"].values(), way["acting"]))] for way in whole
    ]
    return markdown(head, cells)


def measured(folders: Sequence[Path]) -> list[str]:
    """Peak memory of a fresh process on the CPU that is no file's, resident and in turn, beside the estimate.

    The estimate is a device's, of the cameras and tokens that are run. What the process and the engine take for
    themselves is not in it; weights that stay in the mapped file (float32's prefix) are not in what is measured.
    """
    from ki_export.bench.process import process_memory

    head = ["MB", "embeddings", "estimate, all", "measured", "estimate, in turn", "measured"]
    lines = []
    for folder in folders:
        bundle = Bundle.open(folder)
        manifest = bundle.manifest
        need = needs(manifest.config, len(manifest.vocabulary.ids), manifest.precision)
        arguments = ["model", "--backend", "ort", "--cameras", str(CAMERAS), "--tokens", str(PROMPT), "--steps", "1"]
        ran = [process_memory(bundle, *arguments, *more).anonymous_peak for more in ((), ("--sequential",))]
        cells = (need.acting, ran[0], need.sequential, ran[1])
        lines.append([manifest.precision, manifest.config.embeddings, *(f"{size / 1e6:.0f}" for size in cells)])
    return markdown(head, lines)


def main() -> None:
    """Parse and print."""
    parser = argparse.ArgumentParser(description="Memory of a full-size policy on Jetson boards, from its shapes.")
    parser.add_argument(
        "--precision", choices=sorted({*(dtype.name for dtype in PRECISIONS.values()), *WEIGHTS}), default="float16"
    )
    parser.add_argument("--tensorrt", default="10.3", metavar="VERSION", help="that builds the engines (%(default)s)")
    parser.add_argument("--measure", type=Path, nargs="+", metavar="BUNDLE", help="run these once each on the CPU")
    options = parser.parse_args()
    if options.measure:
        print("\n".join(measured(options.measure)))
        return
    need = needs(PI05, FAST_ROWS, options.precision)
    api = tensorrt(options.tensorrt)
    print("\n".join((*graph_table(need, api), "", *board_table(need, api), "", *sums(), *small_boards())))


if __name__ == "__main__":
    main()
