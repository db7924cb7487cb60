"""The seam to the machine: every question that a check asks it. Tests answer in its place."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ki_edge.bundle import Bundle
from ki_edge.errors import KiEdgeError
from ki_runtime.backends.registry import choose_backend
from ki_runtime.policy.proof import Standing, standing

COMMAND_S = 20  # seconds that a command may take
SIDE, TRIES = 1024, 5  # of the matrices whose product says how fast a processor is


class Host:
    """This machine."""

    @property
    def python(self) -> tuple[int, int, int]:
        return sys.version_info[:3]

    @property
    def machine(self) -> str:
        """Processor architecture: "x86_64", "aarch64"."""
        return platform.machine()

    @property
    def system(self) -> str:
        """For people: "Linux 6.8, glibc 2.35"."""
        return " ".join((platform.system(), platform.release(), *platform.libc_ver())).strip()

    @property
    def in_virtual_environment(self) -> bool:
        return sys.prefix != sys.base_prefix

    def environment(self, name: str) -> str | None:
        return os.environ.get(name)

    def read(self, path: str) -> str | None:
        """Text of a file; None if it is not there or may not be read. Device-tree files end in a zero byte."""
        try:
            return Path(path).read_text(encoding="utf-8", errors="replace").rstrip("\0")
        except OSError:
            return None

    def products(self) -> float:
        """Operations a second of this processor: the best of a few products of matrices in float32, a tenth of a
        second in all."""
        import numpy as np

        matrix, times = np.ones((SIDE, SIDE), np.float32), []
        for _ in range(TRIES):
            started = time.perf_counter()
            np.matmul(matrix, matrix)
            times.append(time.perf_counter() - started)
        return 2.0 * SIDE**3 / min(times)

    def find(self, folder: str, pattern: str) -> list[str]:
        """Paths in a folder that match, sorted."""
        return sorted(str(path) for path in Path(folder).glob(pattern))

    def usable(self, path: str) -> bool:
        """Whether this user may read and write a file, a device or a folder."""
        return os.access(path, os.R_OK | os.W_OK)

    def run(self, *command: str) -> str | None:
        """What a command prints; None if it is not there, fails or hangs."""
        if shutil.which(command[0]) is None:
            return None
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    def load(self, module: str) -> Any:
        """Import a module; ImportError says why not, whatever the library raised while it was loading."""
        try:
            return import_module(module)
        except ImportError:
            raise
        except Exception as error:  # libraries that miss a shared object raise OSError, RuntimeError and others
            raise ImportError(f"{type(error).__name__}: {error}") from error

    def version(self, distribution: str) -> str | None:
        """Version of an installed distribution."""
        try:
            return version(distribution)
        except PackageNotFoundError:
            return None

    def free_bytes(self, path: Path) -> int:
        """Free space on the disk of an existing path."""
        return shutil.disk_usage(path).free

    def driver(self) -> Any:
        """The CUDA driver's library; OSError if it is not there."""
        import ctypes

        return ctypes.CDLL("libcuda.so.1")

    def obstacle(self, backend: str, bundle: Bundle | None) -> str | None:
        """What the runtime says that keeps a backend from running a bundle, or any; None if nothing does."""
        try:
            choose_backend(backend, bundle)
        except KiEdgeError as error:
            return str(error).removeprefix(f"backend '{backend}': ")
        return None

    def standing(self, backend: str, bundle: Bundle) -> Standing:
        """What a backend made of a bundle's witness here, if it was asked. KiEdgeError if it cannot run the bundle."""
        return standing(bundle, backend)
