"""A bundle on disk: three graphs, their weights and everything needed to use them, described by `manifest.json`.

Written into a hidden folder beside its target and renamed, so an interrupted export leaves the old bundle or nothing.
Opening checks the manifest, that every file is there with its recorded size, and that no path leaves the folder;
hashes are checked with `verify=True`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from .config import Pi05Config
from .errors import BundleError, CheckpointError
from .manifest_fields import check_fields
from .reading import read_json
from .safetensors_index import SafetensorsIndex

SCHEMA = 1
MANIFEST = "manifest.json"
MAX_MANIFEST = 16_000_000


@dataclass(frozen=True)
class DecodeVocabulary:
    """Which token each column of the FAST logits stands for: `count` ids from `first` upwards, then `extra`."""

    first: int
    count: int
    extra: tuple[int, ...] = ()

    @property
    def ids(self) -> list[int]:
        """Token id of every column (F of them)."""
        return [*range(self.first, self.first + self.count), *self.extra]


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself. JSON objects stay plain dicts where another module owns their meaning."""

    model: dict[str, Any]  # Pi05Config.to_dict()
    contract: dict[str, Any] | None  # PolicyContract.to_json(); None: model only, no tokenizer or statistics
    sampling: dict[str, Any]  # {"time_convention": "openpi"|"lerobot", "num_steps": int}
    precision: str  # "float32"
    graphs: dict[str, dict[str, Any]]  # graph name -> {"file", "inputs", "outputs"}
    weights: dict[str, Any]  # {"file": ..., "runtime": {checkpoint name: name in the file}}
    decode_vocabulary: dict[str, Any]  # DecodeVocabulary as a dict
    tools: dict[str, str]  # versions of what wrote it
    provenance: dict[str, Any]  # where the weights came from
    parity: dict[str, Any]  # {"verified": bool, ...}
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # relative path -> {"size", "sha256"}
    schema: int = SCHEMA

    @property
    def config(self) -> Pi05Config:
        """The model's geometry; BundleError if it is malformed."""
        try:
            return Pi05Config.from_dict(self.model)
        except CheckpointError as error:
            raise BundleError(f"manifest: {error}") from None

    @property
    def vocabulary(self) -> DecodeVocabulary:
        """Columns of the FAST logits; BundleError unless all are tokens of the model."""
        v = self.decode_vocabulary
        first, count, extra = (v.get(name) for name in ("first", "count", "extra"))
        if type(first) is not int or type(count) is not int or not isinstance(extra, list | tuple):
            raise BundleError("manifest: 'decode_vocabulary' needs integers first, count and a list extra")
        size = self.config.vocab_size
        fits = 0 <= first < first + count <= size and all(type(i) is int and 0 <= i < size for i in extra)
        if not fits:
            raise BundleError(f"manifest: 'decode_vocabulary' {v!r:.200} is not within the model's {size} tokens")
        return DecodeVocabulary(first, count, tuple(extra))


@dataclass(frozen=True)
class Bundle:
    """An opened bundle."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> Bundle:
        """Open and check a bundle folder; `verify` also compares every file with its recorded sha256."""
        if not isinstance(path, str | os.PathLike):
            raise BundleError(f"a bundle is given by its folder, got {type(path).__name__}")
        folder = Path(path)
        try:
            there = folder.is_dir()
        except OSError as error:  # such as a name that is too long
            raise BundleError(f"no bundle at {str(folder)[:200]}: {error.strerror}") from None
        if not there:
            raise BundleError(f"no bundle at {folder}: expected a folder written by ki-export")
        bundle = cls(folder, read_manifest(folder / MANIFEST))
        for name, facts in bundle.manifest.files.items():
            _check_file(folder, name, facts, verify)
        for name in bundle._required():
            bundle.file(name)
        return bundle

    def file(self, name: str) -> Path:
        """Path of a file that the manifest lists; BundleError for any other name."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: '{name}' is not in the manifest's file list")
        return self.path / name

    def graph(self, name: str) -> Path:
        """Path of one graph's ONNX file."""
        if name not in self.manifest.graphs:
            raise BundleError(f"{self.path}: no graph '{name}', only {', '.join(self.manifest.graphs)}")
        return self.file(str(self.manifest.graphs[name].get("file")))

    def weights(self) -> SafetensorsIndex:
        """Index of the weights file."""
        try:
            return SafetensorsIndex(self.file(str(self.manifest.weights.get("file"))))
        except CheckpointError as error:
            raise BundleError(f"{self.path}: {error}") from None

    def _required(self) -> Iterator[str]:
        yield str(self.manifest.weights.get("file"))
        for graph in self.manifest.graphs.values():
            yield str(graph.get("file"))


def read_manifest(path: Path) -> Manifest:
    """Parse manifest.json; BundleError says what is wrong with it."""
    if not path.is_file():
        raise BundleError(
            f"{path.parent} has no {MANIFEST}: not a bundle, or its export was interrupted; export it again"
        )
    data = read_json(path, BundleError, MAX_MANIFEST)
    if not isinstance(data, dict) or type(data.get("schema")) is not int:
        raise BundleError(f"{path}: no integer 'schema' in it, so it is not a bundle's manifest")
    if data["schema"] != SCHEMA:
        newer = "newer; upgrade ki-edge" if data["schema"] > SCHEMA else "older; export the checkpoint again"
        raise BundleError(f"{path}: schema {data['schema']} where this version reads {SCHEMA}: the bundle is {newer}")
    known = {f.name: f for f in fields(Manifest)}
    if set(data) != set(known):
        missing, unknown = sorted(set(known) - set(data)), sorted(set(data) - set(known))
        raise BundleError(f"{path}: missing {missing}, unknown {unknown!r:.200}")
    for name in known:
        wanted = (str,) if name == "precision" else (int,) if name == "schema" else (dict,)
        if not isinstance(data[name], wanted) and not (name == "contract" and data[name] is None):
            raise BundleError(f"{path}: '{name}' must be {wanted[0].__name__}, not {type(data[name]).__name__}")
    check_fields(path, data)
    return Manifest(**data)


def _check_file(folder: Path, name: str, facts: Mapping[str, Any], verify: bool) -> None:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or not pure.parts:
        raise BundleError(f"{folder}: the manifest names '{name}', which leaves the bundle; do not use this bundle")
    path = folder / name
    if not path.is_file():
        raise BundleError(f"{folder}: file '{name}' is missing; copy the bundle again")
    if folder.resolve() not in path.resolve().parents:
        raise BundleError(f"{folder}: '{name}' is a link that leaves the bundle; do not use this bundle")
    if path.stat().st_size != facts["size"]:
        raise BundleError(
            f"{folder}: '{name}' has {path.stat().st_size} bytes, recorded {facts['size']}; copy it again"
        )
    if verify and sha256(path) != facts.get("sha256"):
        raise BundleError(
            f"{folder}: '{name}' has changed since the export (its sha256 differs); export or copy it again"
        )


def sha256(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """Hex digest of a file, read in pieces; `progress` is told the bytes done."""
    digest, buffer = hashlib.sha256(), bytearray(1 << 22)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            if progress:
                progress(count)
    return digest.hexdigest()


class BundleWriter:
    """Builds a bundle in `folder`, a hidden sibling of its target. Use through `write_bundle`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._hashes: dict[tuple[int, ...], str] = {}  # of files that have not changed since they were hashed

    def remember(self, path: Path, digest: str) -> None:
        """The sha256 of a file in `folder` that whoever wrote it knows already."""
        self._hashes[_identity(path)] = digest

    def seal(self, manifest: Manifest) -> Bundle:
        """Hash every file, write the manifest and open the result. May be called again after a change."""
        names = sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())
        files = {name: self._facts(self.folder / name) for name in names if name != MANIFEST}
        data = {**asdict(manifest), "files": files}
        text = json.dumps(data, indent=1, ensure_ascii=False)
        partial = self.folder / (MANIFEST + ".partial")
        with partial.open("w", encoding="utf-8") as out:
            out.write(text + "\n")
            out.flush()
            os.fsync(out.fileno())
        partial.replace(self.folder / MANIFEST)
        return Bundle.open(self.folder)

    def _facts(self, path: Path) -> dict[str, Any]:
        identity = _identity(path)
        if identity not in self._hashes:
            self._hashes[identity] = sha256(path)
        return {"size": path.stat().st_size, "sha256": self._hashes[identity]}


def _identity(path: Path) -> tuple[int, ...]:
    """The same for two links to one file, another after a change."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@contextmanager
def write_bundle(target: str | Path, *, force: bool = False) -> Iterator[BundleWriter]:
    """Give a writer whose folder becomes `target` when the block ends without an error, and vanishes otherwise.

    BundleError if `target` exists and `force` is off, or if it exists and is no bundle (it is never deleted then).
    """
    target = Path(target)
    _sweep(target)
    if target.is_symlink() or target.exists():
        if not force:
            raise BundleError(f"output {target} exists: choose another name, or replace it with --force")
        if not (target / MANIFEST).is_file():
            raise BundleError(
                f"output {target} exists and is no bundle, so --force does not replace it: remove it yourself"
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.parent / f".{target.name}.partial-{os.getpid()}"
    folder.mkdir()
    try:
        yield BundleWriter(folder)
        _publish(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, target: Path) -> None:
    old = target.parent / f".{target.name}.old"
    if target.exists():
        target.rename(old)
    folder.rename(target)
    _remove(old)


def _sweep(target: Path) -> None:
    """Remove what a killed export left; put back an old bundle whose replacement never came."""
    old = target.parent / f".{target.name}.old"
    if old.is_dir() and not target.exists():
        old.rename(target)
    _remove(old)
    for stale in target.parent.glob(f".{target.name}.partial-*"):
        pid = stale.name.rsplit("-", 1)[1]
        ours = pid == str(os.getpid())  # in a container, a killed export often had the same process id
        if pid.isdigit() and (ours or not Path(f"/proc/{pid}").exists()):
            shutil.rmtree(stale, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)
