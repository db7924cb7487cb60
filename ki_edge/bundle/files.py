"""The files of a bundle: each where the manifest says, of its size, with its hash, and none from elsewhere.

A file may be a link inside the bundle, or into the cache of the Hugging Face Hub that the bundle itself lies in:

    models--ORG--NAME/snapshots/COMMIT/[...]/prefix.onnx -> models--ORG--NAME/blobs/HASH

Any other link out of the bundle is refused.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ki_edge.errors import BundleError
from ki_edge.files.reading import read_object

MANIFEST = "manifest.json"
DIGEST = "manifest.sha256"  # as sha256sum writes it and checks it
# What is built into a bundle later, and is no part of what was exported
BUILT = re.compile(
    r"(?:.+/)?proof-[0-9a-f]+\.json"
    r"|engines/(?:[^/]+/)?[^/]+\.(?:engine|json|log|timings|kernels)"
    r"|engines/(?:[^/]+/)?\..+|\.weights\.link\.json\.[0-9a-f]+"
)
MAX_MANIFEST = 16_000_000  # bytes
HUB_REPOSITORY = re.compile(r"(?:models|datasets|spaces)--[\w.-]+")
HUB_COMMIT = re.compile(r"[0-9a-f]{40}")


def sha256(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """Hex digest of a file, read in pieces; `progress` is told the bytes of each."""
    digest, buffer = hashlib.sha256(), bytearray(1 << 22)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            if progress:
                progress(count)
    return digest.hexdigest()


def check_file(folder: Path, name: str, facts: Mapping[str, Any], verify: bool) -> None:
    """BundleError unless a file is there with its recorded size and, with `verify`, its sha256."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or not pure.parts:
        raise BundleError(f"{folder}: the manifest names '{name}', which leaves the bundle; do not use this bundle")
    path = folder / name
    if not path.is_file():
        raise BundleError(f"{folder}: file '{name}' is missing; copy the bundle again")
    check_inside(folder, name)
    size = path.stat().st_size
    if size != facts["size"]:
        raise BundleError(f"{folder}: '{name}' has {size} bytes, recorded {facts['size']}; copy it again")
    if verify and sha256(path) != facts.get("sha256"):
        raise BundleError(
            f"{folder}: '{name}' has changed since the export (its sha256 differs); export or copy it again"
        )


def check_inside(folder: Path, name: str) -> None:
    """BundleError if a file of a bundle is a link that leads out of it, but for the Hub's own into its cache."""
    home, real = folder.resolve(), (folder / name).resolve()
    if home not in real.parents and real.parent != hub_blobs(home):
        raise BundleError(f"{folder}: '{name}' is a link that leaves the bundle; do not use this bundle")


def hub_blobs(folder: Path) -> Path | None:
    """Where the Hub's cache keeps the files of the repository that a resolved folder is a snapshot of, or lies in."""
    for snapshot in (folder, *folder.parents):
        repository = snapshot.parent.parent
        named = HUB_COMMIT.fullmatch(snapshot.name) and HUB_REPOSITORY.fullmatch(repository.name)
        if named and snapshot.parent.name == "snapshots":
            return repository / "blobs"
    return None


def check_replaceable(target: Path, beside: Collection[str]) -> None:
    """BundleError unless a folder is a bundle and holds nothing but its files, those `beside` them, and engines."""
    why = f"output {target} exists and is not a bundle, so --force does not replace it: remove it yourself"
    if not (target / MANIFEST).is_file():
        raise BundleError(why)
    if target.is_symlink():
        return  # the link is replaced, not what it points to
    try:
        content = read_object(target / MANIFEST, BundleError, MAX_MANIFEST)
    except BundleError as error:
        raise BundleError(f"{why} ({error})") from None
    files = content.get("files")
    if type(content.get("schema")) is not int or not isinstance(files, dict):
        raise BundleError(why)
    own = {*files, MANIFEST, *beside}
    for path in sorted(target.rglob("*")):
        name = path.relative_to(target).as_posix()
        if name not in own and not BUILT.fullmatch(name) and (path.is_symlink() or not path.is_dir()):
            raise BundleError(f"output {target} holds {name}, which is not part of the bundle: move it elsewhere first")
