"""Which of a bundle's graphs are loaded: all of them from their first use on, or one after the other.

One after the other, an inference needs the memory of its largest graph rather than of their sum, and takes as much
longer as loading each of them again takes. K/V and x stay on the device in between: buffers outlive their session.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from ki_edge import graphs
from ki_edge.bundle import Bundle
from ki_edge.errors import BackendError
from ki_edge.graphs import GraphSpec
from ki_runtime.backends.session import Loaded, Session

from .decode import FastStage
from .denoise import DenoiseStage, runtime_weights
from .embeddings import table_of
from .prefix import PrefixStage
from .room import Stage

Opener = Callable[[GraphSpec], Session]


class Stages:
    """The graphs of a bundle with their memory: prefix and denoise at once, fast_decode from its first use on.

    `convention`: of flow times, as in the manifest. `seconds`: what the last loading of each graph took.
    """

    sequential = False

    def __init__(self, bundle: Bundle, open_graph: Opener, convention: str) -> None:
        self._open_graph, self._convention = open_graph, convention
        self._config = bundle.manifest.config
        self._specs = {spec.name: spec for spec in graphs.specs(self._config, fast=True)}
        self._table, self._tensor = table_of(bundle), runtime_weights(bundle)
        self._tables: dict[bytes, npt.NDArray[np.float32]] = {}
        self._facts: dict[str, Loaded | None] = {}
        self.seconds: dict[str, float] = {}
        self._prefix: PrefixStage | None = None
        self._denoise: DenoiseStage | None = None
        self._fast: FastStage | None = None
        self._sessions: dict[str, Session] = {}
        self.prompt_bucket = self.prefix.prompt_bucket
        assert self.denoise is not None  # both are loaded once: what fails, fails here

    @property
    def prefix(self) -> PrefixStage:
        """The prefix graph."""
        if self._prefix is None:
            self._prefix = PrefixStage(self._load(graphs.PREFIX.name), self._table)
        return self._prefix

    @property
    def denoise(self) -> DenoiseStage:
        """The denoise graph."""
        if self._denoise is None:
            session = self._load(graphs.DENOISE.name)
            self._denoise = DenoiseStage(session, self._tensor, self._config, self._convention, self._tables)
        return self._denoise

    @property
    def fast(self) -> FastStage:
        """The graph that decodes tokens."""
        if self._fast is None:
            self._fast = FastStage(self._load(graphs.FAST_DECODE.name), self._table)
        return self._fast

    def loaded(self) -> tuple[Stage, ...]:
        """The stages that are in memory."""
        return tuple(stage for stage in (self._fast, self._prefix, self._denoise) if stage is not None)

    def session(self, graph: str) -> Session | None:
        """The session of a graph; None while it is not in memory."""
        return self._sessions.get(graph)

    def facts(self, graph: str) -> Loaded | None:
        """What a graph was made of when it was last loaded, where that is more than the bundle's own graph."""
        return self._facts.get(graph)

    def _load(self, graph: str) -> Session:
        start = time.perf_counter()
        session = self._sessions[graph] = self._open_graph(self._specs[graph])
        self.seconds[graph] = time.perf_counter() - start
        self._facts[graph] = session.loaded
        return session

    def _close(self) -> None:
        """Let go of all graphs."""
        self._prefix = self._denoise = self._fast = None
        self._sessions = {}


class SequentialStages(Stages):
    """One graph in memory at a time: asking for another lets go of the one before, once its work is done."""

    sequential = True

    @property
    def cost(self) -> float:
        """Seconds that an inference spends loading, as they were last measured."""
        return sum(self.seconds[name] for name in (graphs.PREFIX.name, graphs.DENOISE.name))

    def describe(self) -> str:
        """One line for people: what it costs."""
        parts = ", ".join(f"{name} {self.seconds[name]:.2f}" for name in (graphs.PREFIX.name, graphs.DENOISE.name))
        return (
            f"sequential: one graph in memory at a time; of every inference {self.cost:.2f} s are spent loading "
            f"({parts}); a robot whose chunk is shorter than an inference holds meanwhile"
        )

    def _load(self, graph: str) -> Session:
        if self._prefix is not None:
            self._prefix.wait()  # a device may still be at it; what it gave outlives it
        self._close()
        give_back()
        known = self._facts.get(graph)
        session = super()._load(graph)
        if known is not None and (session.loaded is None or session.loaded.environment != known.environment):
            self._facts[graph] = known
            self._close()
            raise BackendError(
                f"graph {graph}: what was loaded now is not what was loaded and proven before; start again, which "
                "proves it first"
            )
        return session


def give_back() -> None:
    """Return to the system what nobody refers to any more: sessions that know themselves, free pages of the heap."""
    gc.collect()
    with suppress(OSError, AttributeError):  # of glibc alone
        ctypes.CDLL(None).malloc_trim(0)
