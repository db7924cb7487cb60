"""Boards and graphics cards that one may buy, and whether a policy fits them: from the makers' figures and its shapes.

May import what the doctor may; ki_export and the benchmarks read the table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ki_edge.config import PI05
from ki_edge.errors import ArgumentError, BackendError
from ki_runtime.gpu.device import PRECISIONS, check_precision
from ki_runtime.trt.api import Api
from ki_runtime.trt.memory import needed

from .bundle import read_contents
from .finding import in_bytes
from .memory import Needs, needs

GB = 1e9
RESERVED = 2.5e9  # bytes taken to belong to the system, the desktop and CUDA's context where memory is shared
CONTEXT = 0.5e9  # by CUDA's context on a card of its own
FAST_ROWS = 2050  # columns of the FAST logits of the full-size model
FLAGS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
ORIN = ("JetPack 6.2 (TensorRT 10.3, Python 3.10) or 7.2 (TensorRT 10.16, Python 3.12)", "10.3")
THOR = ("JetPack 7.0 or newer (TensorRT 10.13, Python 3.12)", "10.13")
CARD = ("a driver for CUDA 12 or 13; TensorRT 10.3 or newer, or TensorRT-RTX", "10.13")
JETSON_UNTRIED = "Nothing has been run on a Jetson yet"
CARD_UNTRIED = "No engine has been run on such a card yet"


@dataclass(frozen=True)
class Board:
    """Memory in GB, the host's too on Jetsons (`shared`). Where known: bandwidth in GB/s, peaks in 1e12 operations a
    second of dense matrix products (16-bit with float32 accumulation, 8-bit).
    """

    key: str
    name: str
    memory: float
    capability: tuple[int, int]
    software: tuple[str, str]  # for people; the oldest TensorRT among it
    untried: str
    bandwidth: float = 0.0
    peak16: float = 0.0
    peak8: float = 0.0

    @property
    def shared(self) -> bool:
        return self.untried is JETSON_UNTRIED

    @property
    def free(self) -> float:
        """Bytes that are taken to be left for a policy."""
        return GB * self.memory - (RESERVED if self.shared else CONTEXT)


BOARDS = (
    Board("orin-8gb", "Jetson Orin Nano or NX 8 GB", 8, (8, 7), ORIN, JETSON_UNTRIED),
    Board("orin-16gb", "Jetson Orin NX 16 GB", 16, (8, 7), ORIN, JETSON_UNTRIED),
    Board("orin-32gb", "Jetson AGX Orin 32 GB", 32, (8, 7), ORIN, JETSON_UNTRIED),
    Board("orin-64gb", "Jetson AGX Orin 64 GB", 64, (8, 7), ORIN, JETSON_UNTRIED, 204.8, 42.5, 85.0),
    Board("thor", "Jetson Thor", 128, (11, 0), THOR, JETSON_UNTRIED, 273.0, 259.0, 517.0),
    Board("rtx-4090", "RTX 4090", 24, (8, 9), CARD, CARD_UNTRIED, 1008.0, 165.0, 330.0),
    Board("rtx-5090", "RTX 5090", 32, (12, 0), CARD, CARD_UNTRIED, 1792.0, 209.5, 419.0),
    Board("h200", "H200", 141, (9, 0), CARD, CARD_UNTRIED, 4800.0, 989.0, 1979.0),
)


@dataclass(frozen=True)
class Room:
    """Bytes that a policy needs in one precision, and `build`: host memory for compiling its largest engine."""

    acting: int
    with_fast: int
    build: int
    free: float

    @property
    def fits(self) -> bool:
        return self.acting <= self.free


def find_board(key: str) -> Board:
    """ArgumentError with the list for a board that is not in it."""
    found = next((board for board in BOARDS if board.key == key.lower()), None)
    if found is None:
        raise ArgumentError(f"board {key!r:.60} is not known, expected one of {', '.join(b.key for b in BOARDS)}")
    return found


def tensorrt(version: str) -> Api:
    """A TensorRT that need not be installed, for estimates."""
    return Api(SimpleNamespace(), "tensorrt", tuple(map(int, re.findall(r"\d+", version))), version)


def room(board: Board, need: Needs, api: Api) -> Room:
    """What a policy needs there. FAST's engine is built only where it is wanted, so the others count."""
    sizes = [need.graphs[name].weights for name in ("prefix", "denoise")]
    build = max(needed(api, size, shared=board.shared) for size in sizes)
    return Room(need.acting, need.with_fast, build, board.free)


def plan(board: Board, folder: Path | None) -> dict[str, Any]:
    """Whether a bundle fits a board, or without one the full-size π0.5, in each precision, as JSON values.

    BundleError for a folder that is not a bundle.
    """
    contents = None if folder is None else read_contents(folder)
    config, rows = PI05, FAST_ROWS
    if contents is not None:
        config, rows = contents.bundle.manifest.config, len(contents.bundle.manifest.vocabulary.ids)
    api, rooms = tensorrt(board.software[1]), {}
    for precision in FLAGS:
        found = room(board, needs(config, rows, precision), api)
        rooms[precision] = vars(found) | {"fits": found.fits}
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
    text = f"acting takes {in_bytes(room['acting'])}, with FAST {in_bytes(room['with_fast'])}"
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
