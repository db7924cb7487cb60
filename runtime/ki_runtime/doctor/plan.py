"""Whether a policy fits a board that is not here: from the board's memory and the model's shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ki_edge.config import PI05
from ki_edge.dtypes import BY_NAME, LOW_PRECISIONS
from ki_edge.errors import BackendError
from ki_runtime.gpu.device import NEEDS, PRECISIONS, check_precision
from ki_runtime.trt.api import Api, parse_version
from ki_runtime.trt.memory import needed

from .boards import Board
from .bundle import read_contents
from .finding import in_bytes
from .memory import Needs, needs

FAST_ROWS = 2050  # columns of the FAST logits of the full-size model
FLAGS = {name: BY_NAME[name].short for name in ("float16", "bfloat16", "float32")} | {
    name: short for short, name in LOW_PRECISIONS.items()
}


def tensorrt(version: str) -> Api:
    """A TensorRT that need not be installed, for estimates."""
    return Api(SimpleNamespace(), "tensorrt", parse_version(version), version)


def room(board: Board, need: Needs, api: Api) -> dict[str, Any]:
    """Bytes that a policy needs there; `build`: host memory for compiling its largest engine, but for FAST's."""
    sizes = [need.graphs[name].weights for name in ("prefix", "denoise")]
    build = max(needed(api, size, shared=board.shared) for size in sizes)
    found = {"acting": need.acting, "with_fast": need.with_fast, "build": build, "free": board.free}
    return found | {"fits": need.acting <= board.free}


def plan(board: Board, folder: Path | None) -> dict[str, Any]:
    """Whether a bundle fits a board, or without one the full-size π0.5, in each precision, as JSON values.

    BundleError for a folder that is not a bundle.
    """
    contents = None if folder is None else read_contents(folder)
    config, rows = PI05, FAST_ROWS
    if contents is not None:
        config, rows = contents.bundle.manifest.config, len(contents.bundle.manifest.vocabulary.ids)
    api = tensorrt(board.software[1])
    possible = [precision for precision in FLAGS if board.capability >= NEEDS[precision]]
    rooms = {precision: room(board, needs(config, rows, precision), api) for precision in possible}
    own = None if contents is None else contents.precision
    obstacle = None
    try:
        check_precision(own or PRECISIONS[0], [board.capability])
    except BackendError as error:
        obstacle = str(error)
    fits = obstacle is None and (rooms[own]["fits"] if own else any(room["fits"] for room in rooms.values()))
    return {
        "board": board.key,
        "name": board.name,
        "memory_gb": board.memory,
        "software": board.software[0],
        "bundle": None if folder is None else str(folder),
        "precision": own,
        "obstacle": obstacle,
        "fits": fits,
        "precisions": rooms,
        "untried": board.untried,
    }


def lines(board: Board, found: Mapping[str, Any]) -> Iterator[str]:
    """The plan for people."""
    what, own = found["bundle"] or "a full-size π0.5", found["precision"]
    yield f"{board.name}: {board.memory:g} GB" + (" shared by CPU and GPU" if board.shared else " on the card")
    yield f"software: {board.software[0]}"
    yield f"free for a policy: about {in_bytes(board.free)}, once system and CUDA have theirs (an assumption)"
    for precision, each in found["precisions"].items():
        mark = " (this bundle)" if precision == own else ""
        yield f"  {precision + mark:24} {'fits' if each['fits'] else 'does not fit'}: {_needs(board, each)}"
    yield f"{board.untried}: these figures are computed from the model's shapes, not measured."
    yield from _verdict(what, found)


def _needs(board: Board, room: Mapping[str, Any]) -> str:
    text = f"acting takes {in_bytes(room['acting'])}"
    if room["with_fast"] > room["acting"]:
        text += f", with FAST {in_bytes(room['with_fast'])}"
    if not room["fits"]:
        return text
    if room["with_fast"] > room["free"]:
        text += " (too much)"
    build = f"compiling takes {in_bytes(room['build'])}"
    if not board.shared:
        return f"{text}; {build} of the host's memory"
    more = room["build"] - room["free"]
    return f"{text}; {build}, " + ("which is there" if more <= 0 else f"so {in_bytes(more)} of swap while it builds")


def _verdict(what: str, found: Mapping[str, Any]) -> Iterator[str]:
    fitting = [precision for precision, room in found["precisions"].items() if room["fits"]]
    if found["obstacle"] is not None:
        yield f"{what} cannot run there: {found['obstacle']}"
    elif found["fits"]:
        yield f"{what} fits" + (" there" if found["precision"] else f" in {', '.join(fitting)}")
    else:
        cure = f"export it with --target trt --precision {FLAGS[fitting[0]]}" if fitting else "take a larger board"
        yield f"{what} does not fit: {cure}"
