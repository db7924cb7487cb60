"""What kind of checkpoint a folder holds, and its config.json. Nothing that could run code is ever read.

openpi       model.safetensors (or several, with an index): converted folders and steps of openpi's PyTorch training
openpi-jax   params/ written by orbax: openpi's released checkpoints and JAX training
lerobot      config.json with "type", model.safetensors, policy_preprocessor.json
ki-train     model.safetensors with contract.json beside it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ki_edge.errors import CheckpointError
from ki_edge.files.reading import read_object

Format = Literal["openpi", "openpi-jax", "lerobot", "ki-train"]
LEROBOT_TYPES = ("pi05", "pi0")
WEIGHTS = "model.safetensors"
SHARDS = "model.safetensors.index.json"
ORBAX_MARKS = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt")


@dataclass(frozen=True)
class Found:
    """A recognised checkpoint: `folder` holds config.json and assets, `params` the orbax folder if there is one."""

    format: Format
    folder: Path
    settings: Mapping[str, Any]
    params: Path | None = None


def recognise(path: Path) -> Found:
    """The format of a checkpoint folder, of its params/ folder, or of a model.safetensors itself.

    CheckpointError for what is no checkpoint, for two formats in one folder and for another policy's.
    """
    if path.is_file() and path.name == WEIGHTS:
        path = path.parent
        return Found(_pytorch_format(path, settings := read_settings(path)), path, settings)
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint folder at {path}: expected a folder with {WEIGHTS} or params/")
    if _is_orbax(path):
        return Found("openpi-jax", path.parent, read_settings(path.parent), path)
    pytorch, orbax = _has_pytorch(path), (path / "params").is_dir()
    if pytorch and orbax:
        raise CheckpointError(
            f"{path} holds two formats, {WEIGHTS} and params/: give one of them, {path / WEIGHTS} or {path / 'params'}"
        )
    if orbax:
        return Found("openpi-jax", path, read_settings(path), path / "params")
    if not pytorch:
        raise CheckpointError(_no_checkpoint(path))
    settings = read_settings(path)
    return Found(_pytorch_format(path, settings), path, settings)


def described_by(adapter: Path, base: Found) -> Found:
    """The base, with folder and settings of an adapter that describes a policy itself, as LeRobot's do."""
    settings = read_settings(adapter)
    return Found(_pytorch_format(adapter, settings), adapter, settings, base.params) if "type" in settings else base


def read_settings(folder: Path) -> dict[str, Any]:
    """config.json; empty if there is none."""
    return read_json(folder / "config.json") if (folder / "config.json").is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size. CheckpointError says what is wrong with it."""
    return read_object(path, CheckpointError)


def _pytorch_format(path: Path, settings: Mapping[str, Any]) -> Format:
    if "type" in settings:
        if settings["type"] not in LEROBOT_TYPES:
            raise CheckpointError(
                f"{path} holds LeRobot's policy {settings['type']!r:.60}: expected {' or '.join(LEROBOT_TYPES)}, "
                "which are the policies that ki_edge can run"
            )
        return "lerobot"
    return "ki-train" if (path / "contract.json").is_file() else "openpi"


def _has_pytorch(path: Path) -> bool:
    return (path / WEIGHTS).is_file() or (path / SHARDS).is_file()


def _is_orbax(path: Path) -> bool:
    return any((path / mark).is_file() for mark in ORBAX_MARKS) and not (path / "params").is_dir()


def _no_checkpoint(path: Path) -> str:
    """Why a folder is no checkpoint, with the next thing to try."""
    below = [
        p for p in sorted(path.glob("*/*")) + sorted(path.glob("*/*/*")) if p.name in (WEIGHTS, "params") and p.exists()
    ]
    if below:
        newest = max(below, key=lambda p: p.stat().st_mtime).parent
        return f"{path} holds no checkpoint itself, but folders that do: give one of them, such as {newest}"
    if (path / "adapter_config.json").is_file():
        return f"{path} holds an adapter without its base: open it with its base (--base)"
    if (path / "checkpoints").is_dir():
        return f"{path} holds no checkpoint itself: give a folder in {path / 'checkpoints'}"
    pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in sorted(path.glob(pattern))]
    if pickles:
        return f"{path} has only {pickles[0]}, a pickle, which is never opened: save the model as {WEIGHTS}"
    inside = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
    return f"{path} holds no checkpoint: expected {WEIGHTS} or params/, found {inside}"
