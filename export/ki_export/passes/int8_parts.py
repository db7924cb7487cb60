"""What stands for a weight in 8 bits: names of its parts in graphs and in the weights file, and how they lie there."""

from __future__ import annotations

import re
from dataclasses import dataclass

VALUES, SCALES = ".int8", ".scale"  # what stands behind a weight's name, in graphs and in the weights file
BLOCK_NAME = re.compile(r"(.+\.(?:int8|scale))\.(\d+)")
LEVELS = 127  # largest magnitude of a quantised value
BLOCK = 4096  # outputs that a wide layer computes together; [542, 4096] in float32 are 9 MB


@dataclass(frozen=True)
class Int8Weight:
    """What stands for the initializer `weight` f32 [out, in]: names of `values` int8 [in, out], `scales` f32 [out].

    Of a wide layer, of `blocks(out)` > 1, both are initializers a block, [in, out / blocks] and [out / blocks], and the
    file has one behind the other. A layer whose input comes in blocks has values [in / blocks, out] for each.
    """

    weight: str
    values: str
    scales: str

    @classmethod
    def of(cls, weight: str) -> Int8Weight:
        """The names that a weight's parts always have, so that graphs share them."""
        return cls(weight, weight + VALUES, weight + SCALES)


def blocks(outputs: int) -> int:
    """In how many blocks a layer of so many outputs is computed."""
    return max(1, outputs // BLOCK) if outputs % BLOCK == 0 else 1


def block_name(part: str, at: int) -> str:
    """The initializer of one block of a part."""
    return f"{part}.{at}"


def read_block_name(name: str) -> tuple[str, int] | None:
    """The part that an initializer is a block of, and which; None for others."""
    found = BLOCK_NAME.fullmatch(name)
    return None if found is None else (found[1], int(found[2]))
