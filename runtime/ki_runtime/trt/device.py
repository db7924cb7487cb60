"""The GPU of a machine, as engines know it."""

from __future__ import annotations

from dataclasses import dataclass

from .api import Capability, describe_capabilities

GIB = 1 << 30


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
