"""What engines depend on, and the record of one engine, as engine.json holds them; every field read is checked."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ki_runtime.gpu.device import Capability

from .profiles import Profile

FILE_NAME = re.compile(r"\w[\w.-]{0,99}")
BATCHED = {"images", "x_t", "tokens"}  # inputs of the graphs whose first axis is the batch
Profiles = Mapping[str, Sequence[Profile]]


@dataclass(frozen=True)
class Identity:
    """Everything that engines depend on. `device` None: any GPU of these compute capabilities (TensorRT-RTX).

    `multiprocessors` and `memory` (GiB, see `Device.memory_class`) tell boards of one name apart; None: not known, any.
    """

    weights: str  # sha256
    graphs: Mapping[str, str]  # graph -> sha256
    precision: str
    profiles: Profiles
    device: str | None
    capabilities: tuple[Capability, ...]
    flavour: str  # module name
    version: str
    lean: bool = False  # also runs in the lean runtime
    multiprocessors: int | None = None
    memory: int | None = None

    @property
    def key(self) -> str:
        """Name of the folder: 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def batch(self) -> int:
        """Observations at once that the engines take at most."""
        ends = [
            profile[name][2] for found in self.profiles.values() for profile in found for name in BATCHED & {*profile}
        ]
        return max((shape[0] for shape in ends), default=1)

    def to_json(self) -> dict[str, Any]:
        """JSON form; `from_json` reads it back."""
        shapes = {graph: [profile.to_json() for profile in found] for graph, found in self.profiles.items()}
        plain = {name: value for name, value in self.__dict__.items() if name != "profiles"}
        return {**plain, "capabilities": [list(c) for c in self.capabilities], "profiles": shapes}

    @classmethod
    def from_json(cls, content: Any) -> Identity:
        """Read `to_json`'s form; what Python raises for the wrong content, or BackendError, if it is none."""
        shapes = {graph: tuple(map(Profile.from_json, found)) for graph, found in content["profiles"].items()}
        capabilities = tuple((int(major), int(minor)) for major, minor in content["capabilities"])
        found = cls(**{**content, "profiles": shapes, "capabilities": capabilities})
        _check(found, weights=str, graphs=dict, precision=str, device=(str, type(None)), flavour=str, version=str)
        _check(found, lean=bool, multiprocessors=(int, type(None)), memory=(int, type(None)))
        if not all(isinstance(digest, str) for digest in found.graphs.values()):
            raise TypeError("a hash in 'graphs' is not text")
        return found


@dataclass(frozen=True)
class EngineFile:
    """One compiled graph. `weights`: bytes of weights in its graph; `seconds` that compiling took."""

    file: str
    size: int
    sha256: str
    weights: int
    seconds: float

    @classmethod
    def from_json(cls, content: Any) -> EngineFile:
        """Read its fields; TypeError or ValueError for wrong ones, such as a file outside of the engines' folder."""
        found = cls(**content)
        _check(found, file=str, size=int, sha256=str, weights=int, seconds=(int, float))
        if FILE_NAME.fullmatch(found.file) is None:
            raise ValueError("'file' names a file outside of its folder")
        return found


def _check(found: object, **kinds: type | tuple[type, ...]) -> None:
    for name, kind in kinds.items():
        value = getattr(found, name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise TypeError(f"'{name}' is a {type(value).__name__}")
