"""Boards and graphics cards that one may buy, by their makers' figures; exporter and benchmarks read them too."""

from __future__ import annotations

from dataclasses import dataclass

from ki_edge.errors import ArgumentError

GB = 1e9
RESERVED = 2.5e9  # bytes taken to belong to the system, the desktop and CUDA's context where memory is shared
CONTEXT = 0.5e9  # by CUDA's context on a card of its own
ORIN = ("JetPack 6.2 (TensorRT 10.3, Python 3.10) or 7.2 (TensorRT 10.16, Python 3.12)", "10.3")
THOR = ("JetPack 7.0 or newer (TensorRT 10.13, Python 3.12)", "10.13")
CARD = ("a driver for CUDA 12 or 13; TensorRT 10.3 or newer, or TensorRT-RTX", "10.13")
DATA_CENTRE = ("a driver for CUDA 12 or 13; TensorRT 10.3 or newer (TensorRT-RTX has no engines for it)", "10.13")
JETSON_UNTRIED = "Nothing has been run on a Jetson yet"
CARD_UNTRIED = "No engine has been run on such a card yet"
HOPPER = "No engine has been run on a Hopper yet; ONNX Runtime's CUDA provider was proven on an H100"


@dataclass(frozen=True)
class Board:
    """Memory in GB, the host's too on Jetsons (`shared`). Where known: bandwidth in GB/s, peaks in 1e12 operations a
    second of dense matrix products (16-bit with float32 accumulation, 8-bit, 4-bit where there are any).
    """

    key: str
    name: str
    memory: float
    capability: tuple[int, int]
    software: tuple[str, str]  # for people; the oldest TensorRT among it
    untried: str
    bandwidth: float = 0.0
    peak16: float = 0.0
    peak8: float = 0.0
    peak4: float = 0.0

    @property
    def shared(self) -> bool:
        return self.software in (ORIN, THOR)

    @property
    def free(self) -> float:
        """Bytes that are taken to be left for a policy."""
        return GB * self.memory - (RESERVED if self.shared else CONTEXT)


BOARDS = (
    Board("orin-8gb", "Jetson Orin Nano or NX 8 GB", 8, (8, 7), ORIN, JETSON_UNTRIED),
    Board("orin-16gb", "Jetson Orin NX 16 GB", 16, (8, 7), ORIN, JETSON_UNTRIED),
    Board("orin-32gb", "Jetson AGX Orin 32 GB", 32, (8, 7), ORIN, JETSON_UNTRIED),
    Board("orin-64gb", "Jetson AGX Orin 64 GB", 64, (8, 7), ORIN, JETSON_UNTRIED, 204.8, 42.5, 85.0),
    Board("thor", "Jetson Thor", 128, (11, 0), THOR, JETSON_UNTRIED, 273.0, 259.0, 517.0, 1035.0),
    Board("rtx-4090", "RTX 4090", 24, (8, 9), CARD, CARD_UNTRIED, 1008.0, 165.0, 330.0),
    Board("rtx-5090", "RTX 5090", 32, (12, 0), CARD, CARD_UNTRIED, 1792.0, 209.5, 419.0, 1676.0),
    Board("h100", "H100 SXM", 80, (9, 0), DATA_CENTRE, HOPPER, 3350.0, 989.0, 1979.0),
    Board("h200", "H200", 141, (9, 0), DATA_CENTRE, HOPPER, 4800.0, 989.0, 1979.0),
)


def find_board(key: str) -> Board:
    """ArgumentError with the list for a board that is not in it."""
    found = next((board for board in BOARDS if board.key == key.lower()), None)
    if found is None:
        raise ArgumentError(f"board {key!r:.60} is not known, expected one of {', '.join(b.key for b in BOARDS)}")
    return found
