"""Recorded demonstrations on disk: one frame a row, with the chunk of actions that the demonstrator did next.

meta.json      version, cameras, state_names, action_names, horizon, control_hz, frames, prompts, robot
images.npy     u8 [F,N,h,w,3] RGB
state.npy      f32 [F,s], robot units
actions.npy    f32 [F,H,a], robot units
prompt.npy     i32 [F], index into meta's prompts
points.npy     f32 [F,N,2], optional: where the task's target is in each picture, (x, y) as fractions of width and
               height, y downwards; NaN where it is not in the picture
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.errors import DatasetError
from ki_edge.files.reading import read_object

VERSION = 1
FILES = ("images.npy", "state.npy", "actions.npy", "prompt.npy", "points.npy")
ROWS = 4096  # that are hashed at once
MAX_META = 4_000_000


@dataclass(frozen=True)
class Demonstrations:
    """An opened folder; pictures stay on disk (memory map)."""

    path: Path
    meta: dict[str, Any]
    images: npt.NDArray[np.uint8]
    state: npt.NDArray[np.float32]
    actions: npt.NDArray[np.float32]
    prompt: npt.NDArray[np.int32]
    points: npt.NDArray[np.float32] | None
    real: npt.NDArray[np.bool_] | None = None  # [F,H]: actions that were recorded, not held past an end; None: all

    @classmethod
    def open(cls, path: str | Path) -> Demonstrations:
        """Open and check; DatasetError names the file and what is wrong with it."""
        folder = Path(path)
        meta = _read_meta(folder / "meta.json")
        frames = meta["frames"]
        points = folder / "points.npy"
        data = cls(
            folder,
            meta,
            _load(folder / "images.npy", "uint8", (frames, len(meta["cameras"]), None, None, 3)),
            _load(folder / "state.npy", "float32", (frames, len(meta["state_names"]))),
            _load(folder / "actions.npy", "float32", (frames, meta["horizon"], len(meta["action_names"]))),
            _load(folder / "prompt.npy", "int32", (frames,)),
            _load(points, "float32", (frames, len(meta["cameras"]), 2)) if points.exists() else None,
        )
        for name, array in (("state", data.state), ("actions", data.actions)):
            if not np.isfinite(array).all():
                raise DatasetError(f"{folder / name}.npy holds NaN or infinite values: record the demonstrations again")
        if data.prompt.min() < 0 or data.prompt.max() >= len(meta["prompts"]):
            raise DatasetError(
                f"{folder / 'prompt.npy'}: indices outside the {len(meta['prompts'])} prompts of meta.json"
            )
        return data

    def __len__(self) -> int:
        return len(self.state)

    @property
    def each_action(self) -> npt.NDArray[np.float32]:
        """Recorded actions f32 [*,a], for statistics: of overlapping chunks the first ones."""
        return self.actions.reshape(-1, self.actions.shape[-1]) if self.real is None else self.actions[:, 0]

    def digests(self) -> dict[str, str | None]:
        """sha256 of what the arrays hold, by file name."""
        if (self.path / "meta.json").is_file():
            return {name: digest_file(self.path / name) for name in FILES}
        arrays: dict[str, npt.NDArray[Any]] = {
            "images": self.images,
            "state": self.state,
            "actions": self.actions,
            "prompt": self.prompt,
        }
        return {f"{name}.npy": digest_array(array) for name, array in arrays.items()}

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the recorded pictures."""
        return int(self.images.shape[2]), int(self.images.shape[3])


def digest_file(path: Path) -> str | None:
    """Hexadecimal sha256; None without the file."""
    if not path.exists():
        return None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def digest_array(array: npt.NDArray[Any]) -> str:
    """Hexadecimal sha256 of type, shape and contents."""
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape}".encode())
    for first in range(0, len(array), ROWS):
        digest.update(np.ascontiguousarray(array[first : first + ROWS]).tobytes())
    return digest.hexdigest()


def _read_meta(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DatasetError(f"no {path}: expected a folder of recorded demonstrations with meta.json")
    meta = read_object(path, DatasetError, MAX_META)
    wanted = {"version": int, "cameras": list, "state_names": list, "action_names": list, "horizon": int,
              "frames": int, "prompts": list}  # fmt: skip
    for name, kind in wanted.items():
        if type(meta.get(name)) is not kind or not meta[name]:
            raise DatasetError(f"{path}: '{name}' must be a non-empty {kind.__name__}, not {meta.get(name)!r:.80}")
        if kind is int and meta[name] < 1:
            raise DatasetError(f"{path}: '{name}' must be at least 1, not {meta[name]}")
    if meta["version"] != VERSION:
        raise DatasetError(f"{path}: version {meta['version']}, this version reads {VERSION}")
    for name in ("cameras", "prompts", "state_names", "action_names"):
        if not all(isinstance(item, str) for item in meta[name]):
            raise DatasetError(f"{path}: '{name}' must be a list of strings, not {meta[name]!r:.80}")
    hz = meta.get("control_hz")
    if hz is not None and (isinstance(hz, bool) or not isinstance(hz, int | float) or not hz > 0):
        raise DatasetError(f"{path}: 'control_hz' must be a positive number, not {hz!r:.80}")
    return meta


def _load(path: Path, dtype: str, shape: tuple[int | None, ...]) -> npt.NDArray[Any]:
    if not path.is_file():  # a FIFO would be waited for
        raise DatasetError(f"{path} cannot be read: {'not a regular file' if path.exists() else 'no such file'}")
    try:
        array: npt.NDArray[Any] = np.lib.format.open_memmap(path, mode="r")  # type: ignore[no-untyped-call]
    except (OSError, ValueError, TypeError, SyntaxError, EOFError, OverflowError, MemoryError) as error:
        raise DatasetError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None
    fits = array.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, array.shape, strict=True))
    if not fits or array.dtype != dtype:
        expected = " x ".join("*" if n is None else str(n) for n in shape)
        raise DatasetError(f"{path}: {array.dtype} {array.shape}, expected {dtype} {expected}")
    return array
