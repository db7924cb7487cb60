"""The GPU of a machine, as engines know it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ki_edge.dtypes import LOW_PRECISIONS
from ki_edge.errors import ArgumentError, BackendError

Capability = tuple[int, int]
GIB = 1 << 30
# Precisions of engines and the first compute capability that has each.
NEEDS: Mapping[str, Capability] = {
    "float32": (0, 0),
    "float16": (0, 0),
    "bfloat16": (8, 0),
    "nvfp4": (10, 0),
    "float8": (8, 9),
    "int8_static": (7, 5),
}
PRECISIONS = tuple(NEEDS)


@dataclass(frozen=True)
class Device:
    """A GPU. `memory` in bytes; None where something is not known.

    Orin AGX, NX and Nano report one name and one compute capability: their multiprocessors and memory differ.
    """

    name: str
    capability: Capability
    memory: int | None = None
    shared: bool | None = None  # with the host
    multiprocessors: int | None = None

    @property
    def memory_class(self) -> int | None:
        """The memory that was built in, GiB, as the next power of two.

        What is reported is less by what firmware, driver and display take, which changes from one boot to the next.
        """
        if self.memory is None:
            return None
        return 1 << max(0, -(-self.memory // GIB) - 1).bit_length()

    def describe(self) -> str:
        """For people: "Orin (8.7, 16 multiprocessors, 64 GB)"."""
        facts = [describe_capabilities([self.capability])]
        if self.multiprocessors is not None:
            facts.append(f"{self.multiprocessors} multiprocessors")
        if self.memory_class is not None:
            facts.append(f"{self.memory_class} GB")
        return f"{self.name} ({', '.join(facts)})"


def parse_capabilities(text: str) -> tuple[Capability, ...]:
    """ "8.6,12.0" -> ((8, 6), (12, 0)), sorted; ArgumentError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d{1,2}\.\d", part) for part in parts):
        raise ArgumentError(f"compute capability {text!r}: expected numbers such as 8.6, or several as 8.6,12.0")
    found = sorted({(int(major), int(minor)) for major, minor in (part.split(".") for part in parts)})
    return tuple(found)


def describe_capabilities(capabilities: Sequence[Capability]) -> str:
    """((8, 6), (12, 0)) -> "8.6, 12.0"."""
    return ", ".join(f"{major}.{minor}" for major, minor in capabilities)


def check_precision(precision: str, capabilities: Sequence[Capability]) -> None:
    """BackendError if TensorRT, or a GPU of one of these capabilities, cannot compute in a bundle's precision."""
    if precision not in PRECISIONS:
        raise BackendError(
            f"precision {precision} is for the CPU: export the checkpoint with --target trt --precision fp16"
        )
    needed = NEEDS[precision]
    old = [capability for capability in capabilities if capability < needed]
    if old:
        raise BackendError(
            f"{precision} needs compute capability {describe_capabilities([needed])} or newer, not "
            f"{describe_capabilities(old)}: export with --precision {_nearest(precision, old)}"
        )


def _nearest(precision: str, capabilities: Sequence[Capability]) -> str:
    """What ki-export can write in place of a precision for GPUs of all these capabilities: the lowest that is left."""
    low = {manifest: short for short, manifest in LOW_PRECISIONS.items()}
    if precision in low:
        for other, needed in NEEDS.items():
            if other in low and NEEDS[other] < NEEDS[precision] and min(capabilities) >= needed:
                return low[other]
    return "fp16"
