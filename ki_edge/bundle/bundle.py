"""A bundle on disk: its graphs, their weights and everything needed to use them, described by `manifest.json`.

Written into a hidden folder beside its target and exchanged with it, so an interrupted export leaves the old bundle or
nothing (`publishing`). Opening checks the manifest, that every file is there with its recorded size, and that no path
leaves the folder; `verify=True` also compares hashes: of the files with the manifest, of the manifest with
`manifest.sha256` beside it. That finds what was changed by accident; who changes all of them is found by giving the
digest that the export printed.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from ki_edge.commands import tell
from ki_edge.config import Pi05Config
from ki_edge.errors import BundleError, CheckpointError
from ki_edge.files.publishing import publishing
from ki_edge.files.reading import read_file, read_json
from ki_edge.files.safetensors_index import SafetensorsIndex
from ki_edge.files.writing import write_file
from ki_edge.graphs import FAST_DECODE

from .external_data import check_external_data
from .files import DIGEST, MANIFEST, MAX_MANIFEST, check_file, check_inside, check_replaceable
from .files import sha256 as sha256
from .linked import RECORD as LINK
from .linked import check_link, record_link
from .manifest_fields import check_fields

SCHEMA = 1
TRIES = 5
CHECKPOINT = ("model.safetensors", "model.safetensors.index.json", "adapter_config.json", "params", "_METADATA")
Say = Callable[[str], object]


@dataclass(frozen=True)
class DecodeVocabulary:
    """Which token each column of the FAST logits stands for: `count` ids from `first` upwards, then `extra`.

    Of a bundle without the FAST head it is empty.
    """

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
    graphs: dict[str, dict[str, Any]]  # graph name -> {"file", "inputs", "outputs", "opset", "ops", "weight_bytes"}
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
    def budget(self) -> float | None:
        """Cosine of the actions that a low precision was asked to hold; None for the precision's own."""
        found = self.weights.get("budget_cosine")
        return None if found is None else float(found)

    @property
    def has_fast(self) -> bool:
        """Whether the bundle was exported with the FAST head."""
        return FAST_DECODE.name in self.graphs

    @property
    def decodes_fast(self) -> bool:
        """Whether its policy decodes FAST tokens; the contract says so, and a model alone has none."""
        contract = self.contract
        return self.has_fast and isinstance(contract, dict) and contract.get("fast") is not None

    @property
    def vocabulary(self) -> DecodeVocabulary:
        """Columns of the FAST logits; BundleError unless all are tokens of the model, and some if it has the head."""
        v = self.decode_vocabulary
        first, count, extra = (v.get(name) for name in ("first", "count", "extra"))
        if type(first) is not int or type(count) is not int or not isinstance(extra, list | tuple):
            raise BundleError("manifest: 'decode_vocabulary' needs integers first, count and a list extra")
        size = self.config.vocab_size
        fits = (
            0 <= first < size
            and self.has_fast <= count <= size - first
            and all(type(i) is int and 0 <= i < size for i in extra)
        )
        if not fits:
            raise BundleError(f"manifest: 'decode_vocabulary' {v!r:.200} is not within the model's {size} tokens")
        return DecodeVocabulary(first, count, tuple(extra))


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `identity`: device and inode of its folder, which tell whether it is still the same."""

    path: Path
    manifest: Manifest
    identity: tuple[int, int] | None = None

    @classmethod
    def open(cls, path: str | Path, *, verify: bool | str = False, say: Say = tell) -> Bundle:
        """Open and check a bundle folder; `verify` also compares every file with its recorded hash.

        `verify` as text: the digest that the bundle must have, as the export printed it. `say` is told when weights
        that are shared with the checkpoint are hashed again. A bundle that is replaced meanwhile is opened anew.
        """
        if not isinstance(path, str | os.PathLike):
            raise BundleError(f"a bundle is given by its folder, got {type(path).__name__}")
        folder = Path(path)
        for _ in range(TRIES):
            identity = _identity_of(folder)
            if identity is None:
                raise BundleError(f"no bundle at {folder}: expected a folder written by ki-export")
            try:
                bundle = cls._open(folder, identity, verify, say)
            except (BundleError, OSError) as error:
                if _identity_of(folder) != identity:
                    continue
                if isinstance(error, BundleError):
                    raise
                raise BundleError(f"{folder} cannot be read: {error.strerror or error}") from None
            if _identity_of(folder) == identity:
                return bundle
        raise BundleError(f"{folder} is replaced again and again while it is opened")

    @classmethod
    def _open(cls, folder: Path, identity: tuple[int, int], verify: bool | str, say: Say) -> Bundle:
        bundle = cls(folder, read_manifest(folder / MANIFEST), identity)
        check_inside(folder, MANIFEST)
        if verify is not False:
            _check_digest(folder, verify)
        for name, facts in bundle.manifest.files.items():
            check_file(folder, name, facts, verify is not False)
        for name in bundle._required():
            bundle.file(name)
        if bundle.linked:
            path = bundle.file(str(bundle.manifest.weights.get("file")))
            check_link(path, bundle.manifest.files[path.name].get("sha256"), say)
        return bundle

    @property
    def digest(self) -> str:
        """What tells this bundle from every other: the sha256 of its manifest, which holds those of its files."""
        return sha256(self.path / MANIFEST)

    @property
    def linked(self) -> bool:
        """Whether the weights are the checkpoint's own file (--link)."""
        return self.manifest.provenance.get("weights") == "linked"

    def file(self, name: str) -> Path:
        """Path of a file that the manifest lists; BundleError for any other, and if the bundle was replaced."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: '{name}' is not in the manifest's file list")
        self.check_unchanged()
        return self.path / name

    def check_unchanged(self) -> None:
        """BundleError if the bundle was replaced since it was opened: what was read from it then may be of another."""
        if self.identity is not None and _identity_of(self.path) != self.identity:
            raise BundleError(f"{self.path} was replaced or removed since it was opened: open it again")

    def graph(self, name: str) -> Path:
        """Path of one graph's ONNX file, whose weights lie in the bundle's weights file and nowhere else."""
        if name not in self.manifest.graphs:
            raise BundleError(f"{self.path}: no graph '{name}', only {', '.join(self.manifest.graphs)}")
        path = self.file(str(self.manifest.graphs[name].get("file")))
        check_external_data(path, self.file(str(self.manifest.weights.get("file"))))
        return path

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
        if any((path.parent / name).exists() for name in CHECKPOINT):
            raise BundleError(
                f"{path.parent} is a checkpoint, not a bundle: run ki-export {path.parent} -o BUNDLE first"
            )
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


def _check_digest(folder: Path, verify: bool | str) -> None:
    """BundleError unless the manifest is the one that was exported."""
    found = sha256(folder / MANIFEST)
    if isinstance(verify, str):
        if found != verify.strip().lower():
            raise BundleError(f"{folder} has the digest {found}, not {verify[:80]!r}: it is another bundle, or changed")
        return
    recorded = read_file(folder / DIGEST, 1000, BundleError).split(b" ", 1)[0].decode("ascii", "replace")
    if found != recorded:
        raise BundleError(
            f"{folder}: '{MANIFEST}' has changed since the export (its sha256 differs from {DIGEST}); export or copy "
            "it again"
        )


def _identity_of(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except (OSError, ValueError):
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISDIR(status.st_mode) else None


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
        files = {name: self._facts(self.folder / name) for name in names if name not in (MANIFEST, DIGEST, LINK)}
        data = {**asdict(manifest), "files": files}
        text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
        write_file(self.folder / MANIFEST, text, BundleError)
        write_file(self.folder / DIGEST, f"{hashlib.sha256(text.encode()).hexdigest()}  {MANIFEST}\n", BundleError)
        if manifest.provenance.get("weights") == "linked":
            record_link(self.folder / str(manifest.weights["file"]))
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

    BundleError if `target` exists and `force` is off, if it exists and is no bundle or holds anything else beside (it
    is never deleted then), or if it cannot be written.
    """
    check = partial(check_replaceable, beside=(DIGEST, LINK)) if force else _refuse
    with publishing(Path(target), check, BundleError) as folder:
        yield BundleWriter(folder)


def _refuse(target: Path) -> None:
    raise BundleError(f"output {target} exists: choose another name, or replace it with --force")
