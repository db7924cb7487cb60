"""A bundle as it is served: opened, proven, warmed up, and its batches measured; also once more while it is served."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ki_edge.commands import tell
from ki_runtime.policy.policy import Policy
from ki_runtime.policy.proving import prove_opened

from .batching import measure_batching
from .engine import LocalEngine


def spare_cores() -> int:
    """CPU threads for an engine beside an event loop that must answer meanwhile: all that it may use but one."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, there - 1)


class ServedBundle:
    """Arguments as of `Policy.load`, but without `threads` the event loop has a core; `prompt`: what robots will be
    told; `largest_batch`: as of `ServerOptions`.
    """

    def __init__(
        self,
        folder: str | Path,
        backend: str = "auto",
        *,
        threads: int | None = None,
        verify: bool | str = False,
        trust_engines: bool = False,
        sequential: bool = False,
        prompt: str | None = None,
        largest_batch: int = 1,
        say: Callable[[str], object] = tell,
    ) -> None:
        self._folder, self._backend, self._verify = Path(folder), backend, verify
        self._threads = spare_cores() if threads is None else threads
        self._trust, self._prompt, self._largest, self._say = trust_engines, prompt, largest_batch, say
        self._sequential = sequential

    def open(self) -> LocalEngine:
        """Errors as of `Policy.load`."""
        return self._warm(self._load(self._verify))

    def again(self) -> LocalEngine:
        """What lies in the folder now: every hash is checked, and it reproduces its witness here before it answers.

        Errors as of `Policy.load`; both models are in memory meanwhile.
        """
        policy = self._load(self._verify or True)
        prove_opened(policy.sampler, self._say)
        return self._warm(policy)

    def _load(self, verify: bool | str) -> Policy:
        return Policy.load(
            self._folder,
            self._backend,
            threads=self._threads,
            verify=verify,
            build=True,
            trust_engines=self._trust,
            sequential=self._sequential,
            say=self._say,
        )

    def _warm(self, policy: Policy) -> LocalEngine:
        prepared = policy.warm_up(prompt=self._prompt)
        batching = measure_batching(policy, self._largest, self._prompt)
        self._say(
            f"warmed up in {prepared.milliseconds / 1e3:.1f} s; an inference takes {prepared.inference_ms:.0f} ms; "
            f"{batching.text}"
        )
        return LocalEngine(policy, largest_batch=batching.largest, name=self._folder.resolve().name)
