"""Text samples: pictures with a question and an answer in words, by which the backbone learns beside the actions.

A text set is a folder with `samples.jsonl`, an object a line, and the pictures that it names:

    {"image": "pictures/0001.png", "question": "point to the target", "answer": "<loc0512><loc0256>"}

`image` is a path inside the folder, a list of them, or an object of a camera's name to one. PNG or JPEG.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.errors import DatasetError
from ki_edge.files.reading import parse_json, read_file

SAMPLES = "samples.jsonl"
MOST_BYTES = 1 << 30  # of samples.jsonl
MOST_SAMPLES = 5_000_000
MOST_TEXT = 4096  # characters of a question or an answer
MOST_PICTURES = 64  # of a sample
PICTURE_BYTES = 64_000_000
PICTURE_SIDE = 16_384  # pixels
KINDS = ("PNG", "JPEG")


@dataclass(frozen=True, eq=False)
class TextSample:
    """`pictures`: name -> RGB u8 [h,w,3], of their own size; pictures without a name are called "0", "1", ..."""

    pictures: Mapping[str, npt.NDArray[np.uint8]]
    question: str
    answer: str


@dataclass(frozen=True, eq=False)
class TextSet:
    """An opened folder: what samples.jsonl says is checked and in memory, pictures are read when they are asked for."""

    folder: Path
    _lines: tuple[tuple[int, tuple[tuple[str, str], ...], str, str], ...]  # line, (name, path)s, question, answer
    digest: str  # sha256 of samples.jsonl

    @classmethod
    def open(cls, folder: str | Path) -> TextSet:
        """DatasetError names the line that is wrong: not an object, a text missing, a path that leaves the folder."""
        place = Path(folder)
        path = place / SAMPLES
        if not path.is_file():
            raise DatasetError(f"{place} is no text set: expected a folder with {SAMPLES} and the pictures it names")
        content = read_file(path, MOST_BYTES, DatasetError)
        lines: list[tuple[int, tuple[tuple[str, str], ...], str, str]] = []
        for number, line in enumerate(content.splitlines(), 1):
            if not line.strip():
                continue
            if len(lines) == MOST_SAMPLES:
                raise DatasetError(f"{path}: more than {MOST_SAMPLES} samples: split it into several sets")
            lines.append(_read_line(line, number, f"{path}, line {number}"))
        if not lines:
            raise DatasetError(f"{path} holds no sample")
        return cls(place, tuple(lines), hashlib.sha256(content).hexdigest())

    def __len__(self) -> int:
        return len(self._lines)

    def where(self, index: int) -> str:
        """The sample's file and line, for messages."""
        return f"{self.folder / SAMPLES}, {self.place(index)}"

    def place(self, index: int) -> str:
        """The sample's line."""
        return f"line {self._lines[index][0]}"

    def texts(self) -> list[tuple[str, str]]:
        """Question and answer of every sample."""
        return [(question, answer) for _, _, question, answer in self._lines]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the pictures that any sample has, sorted."""
        return tuple(sorted({name for _, pictures, _, _ in self._lines for name, _ in pictures}))

    def sample(self, index: int) -> TextSample:
        """The `index`-th sample. DatasetError names the line and the file of a picture that cannot be read."""
        _, paths, question, answer = self._lines[index]
        pictures = {name: _read_picture(self.folder, path, self.where(index)) for name, path in paths}
        return TextSample(pictures, question, answer)


def _read_line(line: bytes, number: int, where: str) -> tuple[int, tuple[tuple[str, str], ...], str, str]:
    row = parse_json(line, where, DatasetError)
    if not isinstance(row, dict):
        raise DatasetError(f"{where}: expected an object with image, question and answer")
    texts = []
    for name in ("question", "answer"):
        text = row.get(name)
        if not isinstance(text, str) or not text.strip() or len(text) > MOST_TEXT:
            raise DatasetError(f"{where}: {name} is {text!r:.60}: expected a text of 1 to {MOST_TEXT} characters")
        texts.append(text)
    return number, tuple(_paths(row.get("image"), where).items()), texts[0], texts[1]


def _paths(image: Any, where: str) -> dict[str, str]:
    """Name -> path inside the folder."""
    named = image
    if isinstance(image, str):
        named = {"0": image}
    elif isinstance(image, list):
        named = {str(at): path for at, path in enumerate(image)}
    if not isinstance(named, dict) or not 1 <= len(named) <= MOST_PICTURES:
        raise DatasetError(f"{where}: image is {image!r:.60}: expected a path, a list or an object of them")
    for name, path in named.items():
        parts = path.replace("\\", "/").split("/") if isinstance(path, str) else [""]
        if not name or "" in parts or ".." in parts or ":" in parts[0]:
            raise DatasetError(f"{where}: image {path!r:.80}: expected a path inside the set's folder")
    return named


def _read_picture(folder: Path, name: str, where: str) -> npt.NDArray[np.uint8]:
    """RGB u8 [h,w,3] of a file that lies in the folder, whatever links say."""
    from PIL import Image, UnidentifiedImageError

    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DatasetError(f"{where}: image {name!r:.80} leads out of the set's folder")
    try:
        content = read_file(path, PICTURE_BYTES, DatasetError)
        with Image.open(io.BytesIO(content), formats=KINDS) as picture:
            if max(picture.size) > PICTURE_SIDE:
                size = f"{picture.size[0]} x {picture.size[1]} pixels"
                raise DatasetError(f"{name} has {size}, at most {PICTURE_SIDE} a side are read")
            return np.asarray(picture.convert("RGB"))
    except DatasetError as error:
        raise DatasetError(f"{where}: {error}") from None
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        kinds = " or ".join(KINDS)
        raise DatasetError(f"{where}: {path} is no picture ({kinds}): {' '.join(str(error).split())[:120]}") from None
