"""In which ways a policy can be put on a board: by precision, by where its embedding table is, with FAST or without,
all graphs at once or one after the other; what each way takes, and which of them fits the board best.

From the model's shapes (`memory`); nothing here was measured on a board.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from ki_edge.config import Embeddings, Pi05Config
from ki_edge.dtypes import BY_NAME, LOW_PRECISIONS
from ki_runtime.gpu.device import NEEDS, describe_capabilities
from ki_runtime.trt.api import Api
from ki_runtime.trt.memory import needed

from .boards import DATA_CENTRE, GB, Board
from .memory import Needs, needs

COMFORT = 0.9  # of the free memory, up to which an estimate is taken to hold
DISK = 2e9  # bytes a second that an NVMe disk is taken to give
TABLES: tuple[Embeddings, ...] = ("graph", "host")
FLAGS = {name: BY_NAME[name].short for name in ("float16", "bfloat16", "float32")} | {
    name: short for short, name in LOW_PRECISIONS.items()
}
# What is recommended first: the least change of the model that fits. bfloat16 takes what float16 does.
PREFERRED = ("float16", "float8", "int8_static", "nvfp4")


@dataclass(frozen=True)
class Variant:
    """A precision of the manifest and a place of the table. `build`: host memory for compiling its largest engine that
    acts, `build_fast`: FAST's.
    """

    precision: str
    table: Embeddings
    need: Needs
    table_bytes: int  # of the table in one graph that holds it
    build: int
    build_fast: int

    def takes(self, *, fast: bool, sequential: bool) -> int:
        """Bytes on the device at the peak."""
        need = self.need
        if sequential:
            return need.sequential_with_fast if fast else need.sequential
        return need.with_fast if fast else need.acting

    @property
    def loading(self) -> float:
        """Seconds that loading takes of an inference that has one graph in memory at a time, at the speed of DISK."""
        return sum(self.need.graphs[name].weights for name in ("prefix", "denoise")) / DISK

    def adds_up(self) -> Mapping[str, int]:
        """What acting adds up to, with all graphs in memory."""
        prefix, denoise = self.need.graphs["prefix"], self.need.graphs["denoise"]
        return {
            "vision and backbone": prefix.weights - (self.table_bytes if self.table == "graph" else 0),
            "table": self.table_bytes if self.table == "graph" else 0,
            "denoise": denoise.weights,
            "activations": max(prefix.activations, denoise.activations),
            "K/V": prefix.kv,
        }

    def to_json(self) -> dict[str, Any]:
        """Bytes, by the names of the methods above."""
        ways = {"acting": (False, False), "with_fast": (True, False)}
        ways |= {"sequential": (False, True), "sequential_with_fast": (True, True)}
        taken = {name: self.takes(fast=fast, sequential=one) for name, (fast, one) in ways.items()}
        facts = {"build": self.build, "build_fast": self.build_fast, "loading_s": round(self.loading, 2)}
        return {
            "precision": self.precision, "embeddings": self.table, **taken, **facts, "adds_up": dict(self.adds_up()),
        }  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """A variant, and how it runs."""

    variant: Variant
    fast: bool
    sequential: bool

    @property
    def takes(self) -> int:
        """Bytes on the device at the peak."""
        return self.variant.takes(fast=self.fast, sequential=self.sequential)

    def commands(self) -> tuple[str, ...]:
        """What makes and runs it."""
        export = f"ki-export CHECKPOINT -o BUNDLE --target trt --precision {FLAGS[self.variant.precision]}"
        export += " --calibrate RECORDINGS" if self.variant.precision in LOW_PRECISIONS.values() else ""
        export += " --embeddings host" if self.variant.table == "host" else ""
        build = "ki-build BUNDLE" + (" --graphs prefix,denoise,fast_decode" if self.fast else "")
        run = "ki-run BUNDLE --robot NAME" + (" --sequential" if self.sequential else "")
        return f"{export} {'--fast-head' if self.fast else '--no-fast-head'}", build, run

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "precision": self.variant.precision,
            "embeddings": self.variant.table,
            "fast": self.fast,
            "sequential": self.sequential,
            "bytes": self.takes,
            "commands": list(self.commands()),
            "build": max(self.variant.build, self.variant.build_fast if self.fast else 0),
        }


def variants(config: Pi05Config, decode_rows: int, board: Board, api: Api) -> list[Variant]:
    """All that the board's GPU can compute, the largest first."""
    possible = sorted(filter(lambda name: board.capability >= NEEDS[name], FLAGS), key=_order)
    return [_variant(config, decode_rows, each, table, board, api) for each, table in product(possible, TABLES)]


def _variant(
    config: Pi05Config, decode_rows: int, precision: str, table: Embeddings, board: Board, api: Api
) -> Variant:
    need = needs(replace(config, embeddings=table), decode_rows, precision)
    held = needs(replace(config, embeddings="graph"), decode_rows, precision)
    without = needs(replace(config, embeddings="host"), decode_rows, precision)
    table_bytes = held.graphs["prefix"].weights - without.graphs["prefix"].weights
    builds = {name: needed(api, graph.weights, shared=board.shared) for name, graph in need.graphs.items()}
    fast = builds.pop("fast_decode", 0)
    return Variant(precision, table, need, table_bytes, max(builds.values()), fast)


def _order(precision: str) -> int:
    return list(FLAGS).index(precision) if precision not in ("float32",) else -1


def recommend(board: Board, found: Sequence[Variant], *, fast: bool) -> Choice | None:
    """The way that fits with room to spare. Graphs stay in memory before they take turns; then a precision before a
    lower one and the table on the device before the host, which changes the model least; in turn, what loads fastest.
    None if nothing fits.
    """
    usual = [variant for variant in found if variant.precision in PREFERRED]
    resident = sorted(usual, key=lambda v: (PREFERRED.index(v.precision), TABLES.index(v.table)))
    in_turn = sorted(usual, key=lambda v: v.loading)
    choices = [Choice(v, fast, False) for v in resident] + [Choice(v, fast, True) for v in in_turn]
    return next((choice for choice in choices if choice.takes <= COMFORT * board.free), None)


def mark(board: Board, size: int) -> str:
    """How `size` bytes fit: "fits", "tight" where the estimate leaves less than a tenth, "no"."""
    if size > board.free:
        return "no"
    return "fits" if size <= COMFORT * board.free else "tight"


HEAD = ("GB", "table", "acts", "and FAST", "in turn", "and FAST", "loads", "compiling")


def rows(board: Board, found: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """The table, a row a variant as of `to_json`, under HEAD: GB at the peak and whether they fit."""
    for way in found:
        has_fast = way["with_fast"] > way["acting"]
        names = ("acting", "with_fast", "sequential", "sequential_with_fast")
        both = [(name, has_fast or "fast" not in name) for name in names]
        cells = [f"{way[name] / GB:.1f} {mark(board, way[name])}" if want else "" for name, want in both]
        where = "device" if way["embeddings"] == "graph" else "host"
        yield (way["precision"], where, *cells, f"{way['loading_s']:.1f} s", f"{way['build'] / GB:.1f}")


def arithmetic(way: Mapping[str, Any]) -> str:
    """How acting adds up, for people, of a variant as of `to_json`."""
    parts = [f"{name} {size / GB:.2f}" for name, size in way["adds_up"].items() if size]
    return f"{way['acting'] / GB:.2f} GB = {' + '.join(parts)}"


def elsewhere(board: Board, build: int) -> str:
    """Where engines can be compiled that do not fit to be compiled on the board itself."""
    need = f"compiling takes {build / GB:.1f} GB"
    if board.shared:
        more = (build - board.free) / GB
        swap = f"{need}: {more:.1f} GB of swap while it builds" if more > 0 else f"{need}, which is there"
        return (
            f"{swap}; or build on another board of the same module, JetPack and power mode, and copy BUNDLE with its "
            "engines/ (no PC compiles for a Jetson, and no Jetson for another module)"
        )
    if board.software == DATA_CENTRE:
        return f"{need} of the host's memory; or compile on another machine with such a card, and copy BUNDLE"
    return (
        f"{need} of the host's memory; or compile on any x86 PC, which needs no GPU: ki-export --target trt-rtx "
        f"--compute-capability {describe_capabilities([board.capability])}, and copy BUNDLE"
    )
