"""Checkpoints by their Hugging Face Hub id, through huggingface_hub and its cache; its bars show the download.

Only weights, settings and tokenizers are fetched, never a pickle or code. Which commit was fetched is told, so that a
bundle can record it. Cache and environment (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE) are huggingface_hub's.
"""

from __future__ import annotations

import errno
import importlib
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ki_edge.errors import CheckpointError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
WANTED = ("*.json", "*.safetensors", "*tokenizer.model", "params/*", "_CHECKPOINT_METADATA")
UNWANTED = (
    *("*.py", "*.sh", "*.so", "*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.npy", "*.npz"),
    *("*optimizer*", "*training_state/*", "train_state/*", ".*"),
)
TIMEOUT = 20.0  # seconds until the Hub counts as not reachable
INSTALL = "pip install -U 'ki-edge[hub]'"
Say = Callable[[str], object]


@dataclass(frozen=True)
class Resolved:
    """A checkpoint's folder; for one of the Hub also its id and the commit that was fetched."""

    folder: Path
    repo: str | None = None
    revision: str | None = None

    @property
    def origin(self) -> Mapping[str, str]:
        """Where the folder comes from, for a manifest; empty for a local one."""
        return {"repo": self.repo, "revision": self.revision} if self.repo and self.revision else {}


def resolve(name: str | Path, *, revision: str | None = None, say: Say | None = None) -> Resolved:
    """The local folder or file `name`, or else the Hub repository of that id, downloaded into the Hub's cache.

    `revision`: branch, tag or commit of the repository. Without a network a complete copy in the cache is used, and
    `say` is told so. CheckpointError, one line: neither a path nor an id, no such repository or revision, no access,
    no network and not in the cache, not enough disk, an interrupted download, no weights that can be read.
    """
    if _exists(name):
        if revision is not None:
            raise CheckpointError(f"{name} is a local folder: --revision {revision} is for Hub ids only")
        return Resolved(Path(name))
    repo = str(name)
    if not HUB_ID.fullmatch(repo) or "--" in repo or ".." in repo:
        raise CheckpointError(
            f"no checkpoint at {repo[:200]!r}: expected a folder, or a Hub id such as lerobot/pi05_base"
        )
    folder = _fetch(_library(repo), repo, revision, say or (lambda line: None))
    return Resolved(folder, repo, folder.name)


def _exists(name: str | Path) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long for a path, or not allowed to look
        return False


def _library(repo: str) -> Any:
    try:
        hub = importlib.import_module("huggingface_hub")
        errors = importlib.import_module("huggingface_hub.errors")
    except ImportError:
        raise CheckpointError(
            f"no folder {repo}, and to fetch it from the Hub huggingface_hub is missing: {INSTALL}"
        ) from None
    if not hasattr(errors, "IncompleteSnapshotError"):  # without it a half download passes for a whole one
        raise CheckpointError(f"huggingface_hub {hub.__version__} is too old to fetch {repo}: {INSTALL}")
    return hub


def _fetch(hub: Any, repo: str, revision: str | None, say: Say) -> Path:
    """The snapshot folder of a repository, named by its commit, complete."""
    errors, at = hub.errors, f" at revision '{revision}'" if revision else ""
    login = "`hf auth login`, or download it elsewhere and give the folder"
    try:
        info = hub.HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT)
        _check_files(repo, info.siblings or ())
        _check_space(hub, repo, info.siblings or ())
        return _snapshot(hub, repo, revision)
    except CheckpointError:
        raise
    except errors.GatedRepoError:
        raise CheckpointError(f"{repo} is gated: accept its terms on its Hub page, then {login}") from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{repo} has no revision '{revision}': expected a branch, tag or commit") from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"no folder {repo} here, and the Hub has no repository of that name or it is private: {login}"
        ) from None
    except errors.HFValidationError as error:
        raise CheckpointError(f"{repo} is not a Hub id: {_line(error)}") from None
    except Exception as error:  # the network's errors have no common root over versions of the library
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise CheckpointError(f"the disk of {_cache(hub)} is full: {repo} was not fetched; set HF_HOME") from None
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise CheckpointError(f"the Hub refuses access to {repo} ({_line(error)}): {login}") from None
        folder = _from_cache(hub, repo, revision, at, error)
        say(f"{repo}: {_why(error)}; using commit {folder.name} from the cache")
        return folder


def _snapshot(hub: Any, repo: str, revision: str | None, **options: bool) -> Path:
    wanted, unwanted = list(WANTED), list(UNWANTED)
    folder = hub.snapshot_download(
        repo, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted, library_name="ki-edge", **options
    )
    return Path(folder)


def _from_cache(hub: Any, repo: str, revision: str | None, at: str, cause: Exception) -> Path:
    """What an earlier download left, if it is whole."""
    elsewhere = f"download it elsewhere with `hf download {repo}` and give the folder"
    try:
        folder = _snapshot(hub, repo, revision, local_files_only=True)
    except hub.errors.IncompleteSnapshotError:
        raise CheckpointError(
            f"only a part of {repo}{at} is in the local cache and {_why(cause)}: run it again with a network to go on, "
            f"or {elsewhere}"
        ) from None
    except FileNotFoundError:
        folder = None
    if folder is None or not _has_weights(path.relative_to(folder).as_posix() for path in folder.rglob("*")):
        raise CheckpointError(
            f"{repo}{at} is not a folder here, is not in the local cache ({_cache(hub)}), and {_why(cause)}: connect, "
            f"or {elsewhere}"
        ) from None
    return folder


def _check_files(repo: str, files: Iterable[Any]) -> None:
    names = [file.rfilename for file in files]
    if not _has_weights(filter(_is_wanted, names)):
        pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
        found = f"only {pickles[0]}, a pickle, which is never opened" if pickles else f"{len(names)} other files"
        raise CheckpointError(f"{repo} holds no checkpoint: expected *.safetensors or params/ in it, found {found}")


def _check_space(hub: Any, repo: str, files: Iterable[Any]) -> None:
    """CheckpointError if what is not in the cache yet is more than its disk has free."""
    cache = _cache(hub)
    blobs = cache / f"models--{repo.replace('/', '--')}" / "blobs"
    needed = 0
    for file in files:
        digest = file.lfs.sha256 if file.lfs else file.blob_id
        if _is_wanted(file.rfilename) and not (digest and (blobs / digest).exists()):
            needed += file.size or 0
    disk = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise CheckpointError(
            f"{repo} needs {needed / 1e9:.1f} GB more in {cache}, whose disk has {free / 1e9:.1f} GB free: "
            "make room, or set HF_HOME to a folder on another disk"
        )


def _is_wanted(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in WANTED) and not any(fnmatch(name, p) for p in UNWANTED)


def _has_weights(names: Iterable[str]) -> bool:
    return any(name.endswith(".safetensors") or name.startswith("params/") for name in names)


def _cache(hub: Any) -> Path:
    return Path(hub.constants.HF_HUB_CACHE).expanduser().absolute()


def _why(error: Exception) -> str:
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE forbids to fetch it"
    return f"the Hub could not be read ({type(error).__name__}: {_line(error)})"


def _line(error: Exception) -> str:
    """The first line of a message that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")[:200]
