"""Where a bundle comes from and what wrote it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import machine, python_version
from typing import Any

from ki_edge.bundle import sha256
from ki_edge.checkpoints import Checkpoint

PACKAGES = ("ki-edge", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")
Hashes = Mapping[Path, str]


def tool_versions() -> dict[str, str]:
    """Versions of everything that shapes the graphs or verifies them."""
    found = {"python": python_version(), "machine": machine()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def hash_files(paths: Iterable[Path]) -> Hashes:
    """sha256 of each file."""
    return {path: sha256(path) for path in paths}


def provenance(checkpoint: Checkpoint, hashes: Hashes, how: str) -> dict[str, Any]:
    """The checkpoint: its folder's name, format, stored types and hashes; `how` its weights came into the bundle.

    `origin` names repository and revision of a checkpoint that was fetched.
    """
    folder = checkpoint.path.resolve()
    stored = sorted({tensor.dtype for tensor in checkpoint.source.tensors.values()})

    def name(path: Path) -> str:
        path = path.absolute()
        return path.relative_to(folder).as_posix() if folder in path.parents else path.name

    return {
        "checkpoint": folder.name,
        "format": checkpoint.format,
        "origin": dict(checkpoint.origin),
        "sha256": {name(path): digest for path, digest in hashes.items()},
        "stored_types": stored,
        "weights": how,
    }
