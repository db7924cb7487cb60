"""Whether a policy fits a board that is not here: from the board's memory and the model's shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ki_edge.config import PI05
from ki_edge.errors import BackendError
from ki_runtime.gpu.device import NEEDS, PRECISIONS, check_precision
from ki_runtime.trt.api import Api, parse_version
from ki_runtime.trt.memory import needed

from .boards import Board
from .bundle import read_contents
from .finding import in_bytes
from .memory import Needs, needs
from .variants import FLAGS, HEAD, arithmetic, elsewhere, recommend, rows, variants

FAST_ROWS = 2050  # columns of the FAST logits of the full-size model


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
    config, columns = PI05, FAST_ROWS
    if contents is not None:
        config, columns = contents.bundle.manifest.config, len(contents.bundle.manifest.vocabulary.ids)
    api = tensorrt(board.software[1])
    possible = [precision for precision in FLAGS if board.capability >= NEEDS[precision]]
    rooms = {precision: room(board, needs(config, columns, precision), api) for precision in possible}
    ways = variants(config, columns, board, api)
    best = {name: recommend(board, ways, fast=fast) for name, fast in (("acting", False), ("with_fast", True))}
    own = None if contents is None else contents.precision
    obstacle = None
    try:
        check_precision(own or PRECISIONS[0], [board.capability])
    except BackendError as error:
        obstacle = str(error)
    mine = [way for way in ways if own is None or (way.precision, way.table) == (own, config.embeddings)]
    fits = obstacle is None and any(way.takes(fast=False, sequential=True) <= board.free for way in mine)
    return {
        "board": board.key,
        "name": board.name,
        "memory_gb": board.memory,
        "software": board.software[0],
        "bundle": None if folder is None else str(folder),
        "precision": own,
        "embeddings": config.embeddings,
        "obstacle": obstacle,
        "fits": fits,
        "precisions": rooms,
        "variants": [variant.to_json() for variant in ways],
        "recommended": {name: None if way is None else way.to_json() for name, way in best.items()},
        "untried": board.untried,
    }


def lines(board: Board, found: Mapping[str, Any]) -> Iterator[str]:
    """The plan for people."""
    what = found["bundle"] or "a full-size π0.5"
    yield f"{board.name}: {board.memory:g} GB" + (" shared by CPU and GPU" if board.shared else " on the card")
    yield f"software: {board.software[0]}"
    yield f"free for a policy: about {in_bytes(board.free)}, once system and CUDA have theirs (an assumption)"
    table = [HEAD, *rows(board, found["variants"])]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield (
        'table: of the embeddings (ki-export --embeddings host); "in turn": one graph in memory at a time '
        "(--sequential), which loads for so long before every chunk (2 GB/s of disk, an assumption)"
    )
    yield '"fits" leaves a tenth of what is free to what is not counted, "tight" less'
    yield f"{board.untried}: these figures are computed from the model's shapes, not measured."
    yield from _verdict(board, what, found)


def _verdict(board: Board, what: str, found: Mapping[str, Any]) -> Iterator[str]:
    if found["obstacle"] is not None:
        yield f"{what} cannot run there: {found['obstacle']}"
        return
    own = _own(found)
    if own is not None and own["acting"] <= board.free:
        yield f"{what} fits there: {arithmetic(own)}; {elsewhere(board, own['build'])}"
        return
    if own is not None and own["sequential"] <= board.free:
        yield f"{what} fits there with --sequential alone: {in_bytes(own['sequential'])} at a time"
    elif own is not None:
        yield f"{what} does not fit: {arithmetic(own)}"
    best = found["recommended"]
    if best["acting"] is None:
        yield f"{what} does not fit: take a larger board" if own is None else "no precision fits: take a larger board"
    for name, way in best.items():
        if way is None or (name == "with_fast" and own is not None):
            continue
        variant = next(v for v in found["variants"] if _same(v, way["precision"], way["embeddings"]))
        adds = arithmetic(variant) if not (way["fast"] or way["sequential"]) else in_bytes(way["bytes"])
        turns = f", loading for about {variant['loading_s']:.1f} s before every chunk" if way["sequential"] else ""
        yield f"to act{' and decode FAST' if way['fast'] else ''}: {adds}{turns}"
        yield from (f"    {command}" for command in way["commands"])
        yield f"  {elsewhere(board, way['build'])}"


def _own(found: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The variant that the bundle is."""
    ways = (way for way in found["variants"] if _same(way, found["precision"], found["embeddings"]))
    return next(ways, None)


def _same(way: Mapping[str, Any], precision: str | None, embeddings: str) -> bool:
    return bool((way["precision"], way["embeddings"]) == (precision, embeddings))
