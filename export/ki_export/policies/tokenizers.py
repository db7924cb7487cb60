"""The tokenizer's file: given, in the checkpoint, or already on this machine. Nothing is downloaded."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ki_edge.errors import ArgumentError, CheckpointError

TOKENIZER = "tokenizer.model"
MAX_BYTES = 64_000_000
MAX_SNAPSHOTS = 100
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
OPENPI_FILE = "big_vision/paligemma_tokenizer.model"


@dataclass(frozen=True)
class TokenizerFile:
    """A SentencePiece model, read whole; `source` says where it was found."""

    content: bytes
    source: str

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


def find_tokenizer(folder: Path, given: Path | None, repositories: Iterable[str]) -> TokenizerFile | None:
    """The tokenizer of a checkpoint, or None.

    In this order: `given`, the checkpoint's folder, the Hugging Face cache (`repositories`), openpi's cache.
    """
    if given is not None:
        if not given.is_file():
            raise ArgumentError(f"--tokenizer {given}: no such file")
        return _read(given, given.name)
    for path, source in _places(folder, tuple(repositories)):
        if path.is_file():
            return _read(path, source)
    return None


def missing_tokenizer(repositories: Iterable[str]) -> str:
    """The sentence that asks for one."""
    names = " or ".join(repositories)
    return f"no assets/{TOKENIZER} (give --tokenizer, the {TOKENIZER} of {names}; the Hugging Face cache has none)"


def _places(folder: Path, repositories: tuple[str, ...]) -> Iterator[tuple[Path, str]]:
    for name in (f"assets/{TOKENIZER}", TOKENIZER):
        yield folder / name, name
    for repository in repositories:
        if REPOSITORY.fullmatch(repository):
            for snapshot in _snapshots(_hub_cache() / f"models--{repository.replace('/', '--')}"):
                yield snapshot / TOKENIZER, f"Hugging Face cache, {repository} at {snapshot.name}"
    if any("paligemma" in repository for repository in repositories):
        yield _openpi_cache() / OPENPI_FILE, f"openpi's cache, {OPENPI_FILE}"


def _snapshots(repository: Path) -> list[Path]:
    """Cached revisions, the one of `main` first."""
    folder = repository / "snapshots"
    snapshots = sorted(folder.iterdir())[:MAX_SNAPSHOTS] if folder.is_dir() else []
    main = repository / "refs" / "main"
    name = main.read_text(encoding="utf-8", errors="replace").strip() if main.is_file() else ""
    return sorted(snapshots, key=lambda path: path.name != name)


def _hub_cache() -> Path:
    """As huggingface_hub finds it."""
    if given := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(given).expanduser()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return (Path(os.environ.get("HF_HOME") or cache / "huggingface") / "hub").expanduser()


def _openpi_cache() -> Path:
    return Path(os.environ.get("OPENPI_DATA_HOME") or "~/.cache/openpi").expanduser()


def _read(path: Path, source: str) -> TokenizerFile:
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise CheckpointError(f"{path}: {size} bytes are no tokenizer (at most {MAX_BYTES})")
    return TokenizerFile(path.read_bytes(), source)
