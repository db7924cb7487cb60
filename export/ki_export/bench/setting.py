"""What is known before anything is measured: the bundle, what runs it, and the cases."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ki_edge.bundle import Bundle
from ki_edge.config import Pi05Config
from ki_edge.errors import ArgumentError
from ki_edge.policy.contract import PolicyContract
from ki_runtime.backends.registry import choose_backend

from .machine import cores
from .options import BenchOptions, Case, cases
from .process import Memory, Startup, process_memory, start_once
from .stages import Room, Works, room


@dataclass(frozen=True, eq=False)
class Setting:
    """One bundle's benchmark. The first of `cases` is the main one."""

    bundle: Bundle
    backend: str
    threads: int
    options: BenchOptions
    space: Room
    cases: Sequence[Case]
    works: Works

    @property
    def config(self) -> Pi05Config:
        return self.bundle.manifest.config

    @property
    def contract(self) -> PolicyContract | None:
        """None for a bundle of the model alone."""
        found = self.bundle.manifest.contract
        return None if found is None else PolicyContract.from_json(found)


def prepare(bundle: str | Path | Bundle, options: BenchOptions) -> Setting:
    """ArgumentError for what the bundle has no room for, or does not have; BundleError and BackendError."""
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    if options.fast and not opened.manifest.has_fast:
        raise ArgumentError(f"{opened.path} was exported without the FAST head, so it decodes no tokens: leave it out")
    if options.picture_size is not None and opened.manifest.contract is None:
        raise ArgumentError(f"{opened.path} holds a model, not a policy: it resizes no pictures of --picture-size")
    space = room(opened)
    steps = int(opened.manifest.sampling["num_steps"])
    wanted = cases(options, slots=space.slots, padded=space.padded, steps=steps)
    threads = options.threads or cores()
    return Setting(opened, choose_backend(options.backend, opened).name, threads, options, space, wanted, Works(opened))


def fresh_process(setting: Setting) -> tuple[Memory | None, Startup]:
    """Its memory (where the kernel tells), then its times with the files in the page cache."""
    main = setting.cases[0]
    arguments = ["model", "--backend", setting.backend, "--threads", str(setting.threads)]
    arguments += ["--cameras", str(main.cameras), "--tokens", str(main.tokens), "--steps", str(main.steps)]
    arguments += ["--sequential"] if setting.options.sequential else []
    memory = process_memory(setting.bundle, *arguments) if sys.platform.startswith("linux") else None
    return memory, start_once(setting.bundle.path, *arguments)
