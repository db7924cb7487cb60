"""Where a bundle comes from and what wrote it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from platform import machine, python_version
from typing import Any

from ki_edge.bundle import sha256
from ki_edge.model import Checkpoint

PACKAGES = ("ki-edge", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


def tool_versions() -> dict[str, str]:
    """Versions of everything that shapes the graphs or verifies them."""
    found = {"python": python_version(), "machine": machine()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def provenance(checkpoint: Checkpoint, how: str) -> dict[str, Any]:
    """The checkpoint: its folder's name, layout, stored types and hash; `how` its weights came into the bundle."""
    entries = checkpoint.index.entries.values()
    return {
        "checkpoint": checkpoint.path.resolve().name,
        "layout": checkpoint.layout,
        "sha256": sha256(checkpoint.index.path),
        "stored_types": sorted({entry.dtype for entry in entries}),
        "weights": how,
    }
