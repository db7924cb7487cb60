"""The shapes that an engine accepts, from the graphs' symbols and the contract.

One profile a graph. TensorRT chooses kernels for a profile's optimum and makes them valid in its whole range; a second
profile would double the build and add weight copies and context memory, to gain only where one graph runs in two
regimes. fast_decode does (the opening tokens once, then one token hundreds of times) and is tuned for the one token.

Prompt lengths come in buckets: the runtime pads to the next multiple of PROMPT_BUCKET with masked tokens, which nobody
attends to and which take no position. So few shapes occur, and each has its CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ki_edge import graphs
from ki_edge.bundle import Bundle, Manifest
from ki_edge.errors import ArgumentError, BackendError
from ki_edge.graphs import TensorSpec
from ki_edge.policy.contract import FastContract, PolicyContract

PROMPT_BUCKET = 16
TYPICAL_PROMPT = 64  # tokens for which kernels are chosen
FORCED = 15  # tokens that a FAST decoding may be opened with ("Action: " has fewer)
CAMERAS, TOKENS = 3, 200  # of a bundle without a contract
Shape = tuple[int, ...]
Range = tuple[Shape, Shape, Shape]  # least, optimum, most


@dataclass(frozen=True)
class Profile:
    """Least, optimal and largest shape of every dynamic input of one graph."""

    shapes: Mapping[str, Range]

    def __getitem__(self, name: str) -> Range:
        return self.shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def accepts(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether inputs of these shapes can run; names of inputs that are not dynamic are ignored."""
        known = [(shape, *self.shapes[name][::2]) for name, shape in shapes.items() if name in self.shapes]
        return all(within(*item) for item in known)

    def covers(self, other: Profile) -> bool:
        """Whether whatever runs in `other` runs in this one."""
        ends = ({name: shapes[at] for name, shapes in other.shapes.items()} for at in (0, 2))
        return self.shapes.keys() == other.shapes.keys() and all(map(self.accepts, ends))

    def to_json(self) -> dict[str, Any]:
        """{tensor: [least, optimum, most]}."""
        return {name: [list(shape) for shape in shapes] for name, shapes in self.shapes.items()}

    @classmethod
    def from_json(cls, content: Any) -> Profile:
        """Read `to_json`'s form; BackendError if it is none."""
        try:
            shapes = {str(name): tuple(tuple(map(int, shape)) for shape in found) for name, found in content.items()}
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise BackendError(f"not a profile: {error}") from None
        if not all(len(found) == 3 and len({*map(len, found)}) == 1 for found in shapes.values()):
            raise BackendError("not a profile: every input needs three shapes of one rank")
        return cls({name: (least, best, most) for name, (least, best, most) in shapes.items()})


def bucket(tokens: int) -> int:
    """The padded length of a prompt of `tokens` tokens."""
    return max(1, -(-tokens // PROMPT_BUCKET)) * PROMPT_BUCKET


def profiles(of: Bundle | Manifest, batch: int = 1) -> dict[str, tuple[Profile, ...]]:
    """The profiles of every graph of a bundle: {graph: profiles}, for up to `batch` observations at once.

    ArgumentError for a batch below 1, ContractError and BundleError if the manifest is malformed.
    """
    manifest = of.manifest if isinstance(of, Bundle) else of
    if batch < 1:
        raise ArgumentError(f"batch {batch}: expected at least 1")
    constant = graphs.sizes(manifest.config, len(manifest.vocabulary.ids))
    ranges = symbol_ranges(manifest, batch)
    points = [{**constant, **{symbol: found[at] for symbol, found in ranges.items()}} for at in range(3)]
    found: dict[str, tuple[Profile, ...]] = {}
    for spec in graphs.specs(manifest.config, fast=manifest.has_fast):
        dynamic = [tensor for tensor in spec.inputs if set(tensor.dims) & set(graphs.DYNAMIC)]
        found[spec.name] = (Profile({tensor.name: _range(tensor, points) for tensor in dynamic}),)
    return found


def symbol_ranges(manifest: Manifest, batch: int = 1) -> dict[str, tuple[int, int, int]]:
    """Least, optimum and most of every dynamic symbol of graphs.py."""
    contract = None if manifest.contract is None else PolicyContract.from_json(manifest.contract)
    patches = manifest.config.vision.patches
    cameras = used = CAMERAS
    tokens, fast = TOKENS, None
    if contract is not None:
        cameras, used = len(contract.cameras), sum(camera.key is not None for camera in contract.cameras)
        tokens, fast = contract.max_token_len, contract.fast
    most_tokens = bucket(tokens)
    n, t = (1, used, cameras), (1, min(TYPICAL_PROMPT, most_tokens), most_tokens)
    s = tuple(views * patches + length for views, length in zip(n, t, strict=True))
    room = (fast or FastContract()).max_tokens + FORCED
    return {
        "B": (1, batch, batch),
        "N": n,
        "T": t,
        "S": (s[0], s[1], s[2]),
        "C": (s[0] + 1, s[1] + room, s[2] + room),
        "Q": (1, 1, 1 + FORCED),
    }


def _range(tensor: TensorSpec, points: list[dict[str, int]]) -> Range:
    least, best, most = (tuple(int(dim) for dim in tensor.resolve(point)) for point in points)
    return least, best, most


def within(shape: Shape, least: Shape, most: Shape) -> bool:
    """Whether a shape has the rank of both, and lies between them."""
    return len(shape) == len(least) and all(a <= size <= b for a, size, b in zip(least, shape, most, strict=True))
