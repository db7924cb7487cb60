"""The tokenizer's file: given, in the checkpoint, or already on this machine. Nothing is downloaded.

It is a SentencePiece tokenizer.model or, where there is none, a tokenizer.json.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ki_edge.errors import ArgumentError, CheckpointError
from ki_edge.files.hub import HUB_ID
from ki_edge.files.reading import read_file
from ki_edge.policy.words import MAX_TOKENIZER, is_json

from .paths import is_inside
from .records import PALIGEMMA

FILES = ("tokenizer.model", "tokenizer.json")
MAX_SNAPSHOTS = 100
MAX_REF = 1000  # bytes of a cache's refs/main
OPENPI_FILE = "big_vision/paligemma_tokenizer.model"
GET_IT = (
    f"PaliGemma's is tokenizer.model, 4.3 MB, of {PALIGEMMA} on the Hugging Face Hub, where its licence must be "
    f"accepted once: hf download {PALIGEMMA} tokenizer.model; openpi's copy of it, without a login, is gs://{OPENPI_FILE}"
)


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer, read whole; `source` says where it was found."""

    content: bytes
    source: str

    @property
    def name(self) -> str:
        """What it is called in a bundle's assets."""
        return FILES[is_json(self.content)]

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


def find_tokenizer(folder: Path, given: Path | None, recorded: Iterable[str]) -> TokenizerFile | None:
    """The tokenizer of a checkpoint, or None.

    In this order: `given` (a file, or a folder that holds one), a path inside the checkpoint that is `recorded`, the
    checkpoint's folder, the Hugging Face cache (`recorded` repositories), openpi's cache. Where a checkpoint records a
    path, nothing else stands in for it. ArgumentError, CheckpointError.
    """
    if given is not None:
        return _given(given)
    names = tuple(recorded)
    inside = next((name for name in names if not HUB_ID.fullmatch(name) or _exists(folder, name)), None)
    places = _inside(folder, inside) if inside is not None else _places(folder, names)
    for path, source in places:
        if path.is_file():
            return _read(path, source)
    return None


def missing_tokenizer(recorded: Iterable[str]) -> str:
    """The sentence that asks for one."""
    names = tuple(recorded)
    if not names:
        return f"the policy's tokenizer is not recorded (give --tokenizer; {GET_IT})"
    paths = [name for name in names if not HUB_ID.fullmatch(name)]
    if paths:
        return (
            f"no tokenizer at '{paths[0]:.100}', the path that the checkpoint records (give --tokenizer, or copy the "
            "whole checkpoint)"
        )
    where = " or ".join(names)
    hint = GET_IT if PALIGEMMA in names else f"hf download {names[0]} tokenizer.model"
    return (
        f"no assets/{FILES[0]} (give --tokenizer, the {FILES[0]} of {where}; the Hugging Face cache has none; {hint})"
    )


def _given(path: Path) -> TokenizerFile:
    files = [path]
    if path.is_dir():
        other = sorted(path.glob("*.model"))  # such as openpi's paligemma_tokenizer.model
        files = [*(path / name for name in FILES), *(other if len(other) == 1 else ())]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        what = f"a folder without {' and '.join(FILES)}" if path.is_dir() else "there is no such file"
        raise ArgumentError(f"--tokenizer {path}: {what}; {GET_IT}")
    return _read(found, found.name)


def _inside(folder: Path, name: str) -> Iterator[tuple[Path, str]]:
    """A recorded path; none that leads out of the folder."""
    if is_inside(name):
        yield folder / name, name
        for file in FILES:
            yield folder / name / file, f"{name}/{file}"


def _exists(folder: Path, name: str) -> bool:
    return is_inside(name) and (folder / name).exists()


def _places(folder: Path, repositories: tuple[str, ...]) -> Iterator[tuple[Path, str]]:
    for place in ("assets/", ""):
        for file in FILES:
            yield folder / f"{place}{file}", f"{place}{file}"
    for repository in repositories:
        for snapshot in snapshots(_hub_cache() / f"models--{repository.replace('/', '--')}"):
            for file in FILES:
                yield snapshot / file, f"Hugging Face cache, {repository} at {snapshot.name}"
    if any("paligemma" in repository for repository in repositories):
        yield _openpi_cache() / OPENPI_FILE, f"openpi's cache, {OPENPI_FILE}"


def snapshots(repository: Path) -> list[Path]:
    """Revisions of a repository in the Hugging Face cache, the one of `main` first."""
    folder = repository / "snapshots"
    found = sorted(folder.iterdir())[:MAX_SNAPSHOTS] if folder.is_dir() else []
    main = repository / "refs" / "main"
    name = read_file(main, MAX_REF, CheckpointError).decode("utf-8", "replace").strip() if main.is_file() else ""
    return sorted(found, key=lambda path: path.name != name)


def _hub_cache() -> Path:
    """As huggingface_hub finds it."""
    if given := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(given).expanduser()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return (Path(os.environ.get("HF_HOME") or cache / "huggingface") / "hub").expanduser()


def _openpi_cache() -> Path:
    return Path(os.environ.get("OPENPI_DATA_HOME") or "~/.cache/openpi").expanduser()


def _read(path: Path, source: str) -> TokenizerFile:
    return TokenizerFile(read_file(path, MAX_TOKENIZER, CheckpointError), source)
