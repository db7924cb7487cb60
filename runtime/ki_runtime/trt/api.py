"""TensorRT 10.3 to 11, TensorRT-RTX and the lean runtime behind one interface; all that differs is in this file.

The three Python modules agree nearly name for name. What differs:

    strong typing      a creation flag of the network in TensorRT 10; the only mode of TensorRT 11 and of RTX
    target             TensorRT compiles for the GPU it runs on; RTX for any list of compute capabilities, without a GPU
    timing cache       TensorRT times kernels and keeps the times; RTX times nothing
    stream capture     RTX captures only engines that were told to take all memory from the caller
    serializing        straight into a file where the module has stream writers, else through memory
    the lean runtime   runs engines and has neither builder nor parser
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ki_edge.errors import ArgumentError, BackendError
from ki_runtime.backends.session import first_line
from ki_runtime.gpu.device import Capability

OLDEST = {"tensorrt": (10, 3), "tensorrt_rtx": (1, 7), "tensorrt_lean": (10, 3)}
STRONG_TYPING_ONLY = (11,)
Sink = Callable[[str, str], None]  # severity ("error", "warning", "info"), message

TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX", "tensorrt_lean": "TensorRT lean runtime"}
INSTALL = {
    "tensorrt": "on Jetson it comes with JetPack 6.2 or newer (apt install python3-libnvinfer, and a virtual "
    "environment made with --system-site-packages); elsewhere pip install tensorrt-cu13",
    "tensorrt_rtx": "pip install tensorrt-rtx-cu13",
    "tensorrt_lean": "pip install tensorrt-lean-cu13",
}


def parse_version(text: str) -> tuple[int, ...]:
    """(10, 3, 0, 26) of "10.3.0.26"."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:4])


@dataclass(frozen=True)
class Api:
    """One of the three modules. `version` is comparable, `version_text` the module's own."""

    module: Any
    name: str
    version: tuple[int, ...]
    version_text: str

    @classmethod
    def load(cls, name: str) -> Api:
        """Import "tensorrt", "tensorrt_rtx" or "tensorrt_lean".

        ArgumentError for another name; BackendError if the package is missing, broken or too old, with the cure.
        """
        if name not in TITLES:
            raise ArgumentError(f"TensorRT module {name!r}: expected one of {', '.join(TITLES)}")
        try:
            module = import_module(name)
            text = str(module.__version__)  # a mere folder of that name has none
        except Exception as error:  # also RuntimeError, of stubs that find no libraries
            raise BackendError(f"{TITLES[name]} cannot be imported ({first_line(error)}): {INSTALL[name]}") from error
        api = cls(module, name, parse_version(text), text)
        if api.version < OLDEST[name]:
            oldest = ".".join(map(str, OLDEST[name]))
            raise BackendError(f"{api.title} is too old: at least {oldest} is needed; {INSTALL[name]}")
        return api

    @property
    def title(self) -> str:
        """For people: "TensorRT 10.3.0"."""
        return f"{TITLES[self.name]} {self.version_text}"

    @property
    def is_rtx(self) -> bool:
        return self.name == "tensorrt_rtx"

    @property
    def is_lean(self) -> bool:
        return self.name == "tensorrt_lean"

    @property
    def can_build(self) -> bool:
        return not self.is_lean

    @property
    def keeps_timings(self) -> bool:
        return not self.is_rtx

    @property
    def streams(self) -> bool:
        """Whether an engine can be serialized piece by piece, which saves memory of its size."""
        return hasattr(self.module, "IStreamWriter") and hasattr(
            getattr(self.module, "Builder", None), "build_serialized_network_to_stream"
        )

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """Compute capabilities that can be compiled for without their GPU; none but with RTX."""
        known = self.module.ComputeCapability.__members__ if self.is_rtx else ()
        found = [match for name in known if (match := re.fullmatch(r"SM(\d+)(\d)", name))]
        return tuple(sorted((int(match[1]), int(match[2])) for match in found))

    def logger(self, sink: Sink) -> Any:
        """An ILogger that hands everything but the verbose lines to `sink`; the sink may be called from any thread."""
        severity = self.module.ILogger.Severity
        names = {severity.INTERNAL_ERROR: "error", severity.ERROR: "error"}
        names |= {severity.WARNING: "warning", severity.INFO: "info"}

        class Logger(self.module.ILogger):  # type: ignore[misc,name-defined]
            def log(self, severity: Any, message: str) -> None:
                if severity in names:
                    sink(names[severity], message)

        return Logger()

    def runtime(self, logger: Any, *, lean: bool = False) -> Any:
        """A Runtime, which deserializes engines; needs a GPU.

        `lean`: also those made for the lean runtime, which it takes for code of the host's and refuses unless told that
        they are trusted. They must have been verified.
        """
        runtime = self.module.Runtime(logger)
        if lean:
            runtime.engine_host_code_allowed = True
        return runtime

    def network(self, builder: Any) -> Any:
        """An empty, strongly typed network."""
        if self.is_rtx or self.version >= STRONG_TYPING_ONLY:
            return builder.create_network(0)
        return builder.create_network(1 << int(self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))

    def config(self, builder: Any, workspace: int, targets: Sequence[Capability], *, lean: bool = False) -> Any:
        """A builder configuration with true float32 (no TF32) and at most `workspace` bytes for one layer.

        `targets`: compute capabilities, for RTX only. `lean`: the engine also runs in the lean runtime.
        """
        config, flags = builder.create_builder_config(), self.module.BuilderFlag
        config.clear_flag(flags.TF32)
        config.set_memory_pool_limit(self.module.MemoryPoolType.WORKSPACE, workspace)
        if self.is_rtx:
            config.set_flag(flags.REQUIRE_USER_ALLOCATION)
            config.num_compute_capabilities = len(targets)
            for at, target in enumerate(targets):
                config.set_compute_capability(self._capability(target), at)
        if lean:
            config.set_flag(flags.VERSION_COMPATIBLE)
            config.set_flag(flags.EXCLUDE_LEAN_RUNTIME)
        return config

    def _capability(self, target: Capability) -> Any:
        return self.module.ComputeCapability.__members__[f"SM{target[0]}{target[1]}"]

    def monitor(
        self,
        started: Callable[[str, str | None, int], None],
        stepped: Callable[[str, int], bool],
        finished: Callable[[str], None],
    ) -> Any:
        """An IProgressMonitor: phases (name, the phase around it, number of steps); `stepped` False ends the build."""

        class Monitor(self.module.IProgressMonitor):  # type: ignore[misc,name-defined]
            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                started(phase_name, parent_phase, num_steps)

            def step_complete(self, phase_name: str, step: int) -> bool:
                return stepped(phase_name, step)

            def phase_finish(self, phase_name: str) -> None:
                finished(phase_name)

        return Monitor()

    def serialize(self, builder: Any, network: Any, config: Any, write: Callable[[Any], object]) -> bool:
        """Build, and give the engine's bytes to `write`; False if the build failed or was ended.

        Whatever `write` raises ends the build and is raised after it: the builder is C++, which no exception may cross.
        """
        if not self.streams:
            plan = builder.build_serialized_network(network, config)
            if plan is None:
                return False
            write(memoryview(plan))
            return True

        errors: list[Exception] = []

        class Writer(self.module.IStreamWriter):  # type: ignore[misc,name-defined]
            def write(self, data: Any) -> int:
                if errors:
                    return 0
                try:
                    write(data)
                except Exception as error:
                    errors.append(error)
                    return 0
                return len(data)

        done = bool(builder.build_serialized_network_to_stream(network, config, Writer()))
        if errors:
            raise errors[0]
        return done
