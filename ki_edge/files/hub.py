"""Checkpoints and datasets by their Hugging Face Hub id, through huggingface_hub and its cache; its bars show the
download.

Of a checkpoint only weights, settings and tokenizers are fetched, of a dataset tables and films, never a pickle or
code. Which commit was fetched is told, so that a bundle can record it. Cache and environment (HF_HOME, HF_TOKEN,
HF_ENDPOINT, HF_HUB_OFFLINE) are huggingface_hub's.
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

from ki_edge.errors import CheckpointError, DatasetError, KiEdgeError

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
class Kind:
    """What is fetched: its name for people and for the Hub, files that are wanted and that are not, the error that is
    raised, the files without any of which it is none, an example of an id.
    """

    noun: str
    repo_type: str
    wanted: tuple[str, ...]
    unwanted: tuple[str, ...]
    error: type[KiEdgeError]
    needed: tuple[str, ...]
    example: str

    def is_wanted(self, name: str) -> bool:
        """Whether a file of the repository is fetched."""
        return any(fnmatch(name, p) for p in self.wanted) and not any(fnmatch(name, p) for p in self.unwanted)

    def is_there(self, names: Iterable[str]) -> bool:
        """Whether these files are one."""
        return any(fnmatch(name, pattern) for name in names for pattern in self.needed)


CHECKPOINT = Kind(
    "checkpoint", "model", WANTED, UNWANTED, CheckpointError, ("*.safetensors", "params/*"), "lerobot/pi05_base"
)
DATASET = Kind(
    "dataset", "dataset", ("meta/*.json", "meta/*.jsonl", "meta/*.parquet", "data/*.parquet", "videos/*.mp4"), (".*",),
    DatasetError, ("meta/info.json",), "lerobot/aloha_sim_insertion_human",
)  # fmt: skip


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


def resolve(
    name: str | Path, *, revision: str | None = None, say: Say | None = None, kind: Kind = CHECKPOINT
) -> Resolved:
    """The local folder or file `name`, or else the Hub repository of that id, downloaded into the Hub's cache.

    `revision`: branch, tag or commit of the repository. Without a network a complete copy in the cache is used, and
    `say` is told so. The error of the kind, one line: neither a path nor an id, no such repository or revision, no
    access, no network and not in the cache, not enough disk, an interrupted download, nothing in it that can be read.
    """
    if _exists(name):
        if revision is not None:
            raise kind.error(f"{name} is a local folder: --revision {revision} is for Hub ids only")
        return Resolved(Path(name))
    repo = str(name)
    if not HUB_ID.fullmatch(repo) or "--" in repo or ".." in repo:
        raise kind.error(f"no {kind.noun} at {repo[:200]!r}: expected a folder, or a Hub id such as {kind.example}")
    folder = _fetch(_library(repo, kind), repo, revision, say or (lambda line: None), kind)
    return Resolved(folder, repo, folder.name)


def _exists(name: str | Path) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long for a path, or not allowed to look
        return False


def _library(repo: str, kind: Kind) -> Any:
    try:
        hub = importlib.import_module("huggingface_hub")
        errors = importlib.import_module("huggingface_hub.errors")
    except ImportError:
        raise kind.error(
            f"no folder {repo}, and to fetch it from the Hub huggingface_hub is missing: {INSTALL}"
        ) from None
    if not hasattr(errors, "IncompleteSnapshotError"):  # without it a half download passes for a whole one
        raise kind.error(f"huggingface_hub {hub.__version__} is too old to fetch {repo}: {INSTALL}")
    return hub


def _fetch(hub: Any, repo: str, revision: str | None, say: Say, kind: Kind) -> Path:
    """The snapshot folder of a repository, named by its commit, complete."""
    errors, at = hub.errors, f" at revision '{revision}'" if revision else ""
    login = "`hf auth login`, or download it elsewhere and give the folder"
    try:
        info = hub.HfApi().repo_info(
            repo, revision=revision, repo_type=kind.repo_type, files_metadata=True, timeout=TIMEOUT
        )
        _check_files(repo, info.siblings or (), kind)
        _check_space(hub, repo, info.siblings or (), kind)
        return _snapshot(hub, repo, revision, kind)
    except kind.error:
        raise
    except errors.GatedRepoError:
        raise kind.error(f"{repo} is gated: accept its terms on its Hub page, then {login}") from None
    except errors.RevisionNotFoundError:
        raise kind.error(f"{repo} has no revision '{revision}': expected a branch, tag or commit") from None
    except errors.RepositoryNotFoundError:
        raise kind.error(
            f"no folder {repo} here, and the Hub has no repository of that name or it is private: {login}"
        ) from None
    except errors.HFValidationError as error:
        raise kind.error(f"{repo} is not a Hub id: {_line(error)}") from None
    except Exception as error:  # the network's errors have no common root over versions of the library
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise kind.error(f"the disk of {_cache(hub)} is full: {repo} was not fetched; set HF_HOME") from None
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise kind.error(f"the Hub refuses access to {repo} ({_line(error)}): {login}") from None
        folder = _from_cache(hub, repo, revision, at, error, kind)
        say(f"{repo}: {_why(error)}; using commit {folder.name} from the cache")
        return folder


def _snapshot(hub: Any, repo: str, revision: str | None, kind: Kind, **options: bool) -> Path:
    wanted, unwanted = list(kind.wanted), list(kind.unwanted)
    folder = hub.snapshot_download(
        repo, revision=revision, repo_type=kind.repo_type, allow_patterns=wanted, ignore_patterns=unwanted,
        library_name="ki-edge", **options,
    )  # fmt: skip
    return Path(folder)


def _from_cache(hub: Any, repo: str, revision: str | None, at: str, cause: Exception, kind: Kind) -> Path:
    """What an earlier download left, if it is whole."""
    of = "" if kind is CHECKPOINT else f"--repo-type {kind.repo_type} "
    elsewhere = f"download it elsewhere with `hf download {of}{repo}` and give the folder"
    try:
        folder = _snapshot(hub, repo, revision, kind, local_files_only=True)
    except hub.errors.IncompleteSnapshotError:
        raise kind.error(
            f"only a part of {repo}{at} is in the local cache and {_why(cause)}: run it again with a network to go on, "
            f"or {elsewhere}"
        ) from None
    except FileNotFoundError:
        folder = None
    if folder is None or not kind.is_there(path.relative_to(folder).as_posix() for path in folder.rglob("*")):
        raise kind.error(
            f"{repo}{at} is not a folder here, is not in the local cache ({_cache(hub)}), and {_why(cause)}: connect, "
            f"or {elsewhere}"
        ) from None
    return folder


def _check_files(repo: str, files: Iterable[Any], kind: Kind) -> None:
    names = [file.rfilename for file in files]
    if not kind.is_there(filter(kind.is_wanted, names)):
        pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
        found = f"only {pickles[0]}, a pickle, which is never opened" if pickles else f"{len(names)} other files"
        raise kind.error(
            f"{repo} holds no {kind.noun}: expected {' or '.join(kind.needed).removesuffix('*')} in it, found {found}"
        )


def _check_space(hub: Any, repo: str, files: Iterable[Any], kind: Kind) -> None:
    """CheckpointError if what is not in the cache yet is more than its disk has free."""
    cache = _cache(hub)
    blobs = cache / f"{kind.repo_type}s--{repo.replace('/', '--')}" / "blobs"
    needed = 0
    for file in files:
        digest = file.lfs.sha256 if file.lfs else file.blob_id
        if kind.is_wanted(file.rfilename) and not (digest and (blobs / digest).exists()):
            needed += file.size or 0
    disk = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise kind.error(
            f"{repo} needs {needed / 1e9:.1f} GB more in {cache}, whose disk has {free / 1e9:.1f} GB free: "
            "make room, or set HF_HOME to a folder on another disk"
        )


def _cache(hub: Any) -> Path:
    return Path(hub.constants.HF_HUB_CACHE).expanduser().absolute()


def _why(error: Exception) -> str:
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE forbids to fetch it"
    return f"the Hub could not be read ({type(error).__name__}: {_line(error)})"


def _line(error: Exception) -> str:
    """The first line of a message that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")[:200]
