"""Engines on disk: BUNDLE/engines/KEY/ with engine.json, three engines and the builder's logs.

The key is a hash of everything that an engine depends on. engine.json holds the same facts one by one, so that engines
that do not fit are refused with the reason. The weights' hash is the manifest's, whose sizes are checked when a bundle
is opened; `verify` hashes the engines themselves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ki_edge.bundle import Bundle, sha256
from ki_edge.errors import BackendError, BundleError
from ki_edge.reading import read_object

from .api import TITLES, Api, Capability, describe_capabilities
from .identity import EngineFile, Identity, Profiles
from .profiles import Profile, profiles

FOLDER = "engines"
RECORD = "engine.json"
SCHEMA = 1
MOST_BYTES = 1 << 20  # of engine.json, which takes a few thousand


@dataclass(frozen=True)
class Device:
    """A GPU as engines know it. `memory` in bytes, None if it is not known."""

    name: str
    capability: Capability
    memory: int | None = None
    shared: bool | None = None  # with the host; None: not known


@dataclass(frozen=True)
class Engines:
    """The engines of one folder."""

    folder: Path
    identity: Identity
    files: Mapping[str, EngineFile]  # graph -> engine

    @property
    def profiles(self) -> Profiles:
        return self.identity.profiles

    def path(self, graph: str) -> Path:
        """File of one graph's engine; BackendError if that graph was left out."""
        if graph not in self.files:
            built = ", ".join(self.files)
            raise BackendError(f"{self.folder}: built without {graph}, only {built}; build it with ki-export --build")
        return self.folder / self.files[graph].file

    def damage(self, verify: bool = False) -> list[str]:
        """What is wrong with the files: missing, truncated, or with `verify` changed."""
        found = []
        for graph, facts in self.files.items():
            path = self.path(graph)
            size = path.stat().st_size if path.is_file() else None
            if size != facts.size:
                state = "is missing" if size is None else f"has {size} bytes, recorded {facts.size}: it is truncated"
                found.append(f"{path.name} {state}")
            elif verify and sha256(path) != facts.sha256:
                found.append(f"{path.name} has changed since it was built")
        return found

    def write(self) -> None:
        """Write engine.json."""
        files = {graph: asdict(facts) for graph, facts in self.files.items()}
        content = {"schema": SCHEMA, "key": self.identity.key, "identity": self.identity.to_json(), "graphs": files}
        (self.folder / RECORD).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Engines:
        """Read a folder; BackendError if its engine.json is damaged, of another schema or of another folder."""
        try:
            content = read_object(folder / RECORD, BundleError, MOST_BYTES)
            if content["schema"] != SCHEMA:
                other = f"{content['schema']!r:.20}"
                raise BackendError(f"{folder}: {RECORD} has schema {other}, this version reads {SCHEMA}")
            files = {str(graph): EngineFile.from_json(facts) for graph, facts in content["graphs"].items()}
            found = cls(folder, Identity.from_json(content["identity"]), files)
            if not found.identity.key == content["key"] == folder.name:
                raise ValueError("it is not of this folder: its key is another")
            if files.keys() != found.identity.graphs.keys():
                raise ValueError("its graphs are not those that it has files of")
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            why = f"{type(error).__name__}: {error}"[:200]
            raise BackendError(f"{folder}: {RECORD} is damaged and cannot be read ({why})") from None
        return found


def identify(bundle: Bundle, api: Api, device: str | None, capabilities: Sequence[Capability], **more: Any) -> Identity:
    """The identity of engines of a bundle. `more`: profiles, lean, and graphs, the names of those that are built."""
    manifest, names = bundle.manifest, more.pop("graphs", None) or tuple(bundle.manifest.graphs)
    found = more.pop("profiles", None) or profiles(bundle)
    return Identity(
        weights=str(manifest.files[str(manifest.weights["file"])].get("sha256")),
        graphs={name: str(manifest.files[bundle.graph(name).name].get("sha256")) for name in names},
        precision=manifest.precision,
        profiles={name: found[name] for name in names},
        device=None if api.is_rtx else device,
        capabilities=tuple(sorted(capabilities)),
        flavour=api.name,
        version=api.version_text,
        **more,
    )


def find(bundle: Bundle, api: Api, device: Device, *, verify: bool = False) -> Engines:
    """Engines of this bundle, for this GPU and this TensorRT; `verify` also compares their hashes.

    BackendError with the reason why those on disk do not fit, or that there are none, and the command that builds them.
    """
    found = look(bundle, api, device, verify=verify)
    if isinstance(found, str):
        here = "" if api.is_lean else " here"
        raise BackendError(f"{found}; build them{here}: {build_command(bundle, api)}")
    return found


def build_command(bundle: Bundle, api: Api) -> str:
    """What to type to build engines for this machine."""
    more = " --target trt-rtx" if api.is_rtx else " --lean (run where tensorrt is installed)" if api.is_lean else ""
    return f"ki-export --build {bundle.path}{more}"


def look(bundle: Bundle, api: Api, device: Device, *, verify: bool = False) -> Engines | str:
    """Engines that fit, of several those with most graphs, not made for the lean runtime unless this is it.

    The reason why if there are none. `verify` also compares their hashes, those for the lean runtime always.
    """
    fitting: list[Engines] = []
    refused: list[tuple[int, float, str]] = []
    for folder in sorted(path.parent for path in (bundle.path / FOLDER).glob(f"[!.]*/{RECORD}")):
        try:
            engines = Engines.read(folder)
            reasons = [
                *mismatches(engines.identity, bundle, api, device),
                *engines.damage(verify or engines.identity.lean),
            ]
        except (BackendError, OSError) as error:
            reasons = [str(error)]
        else:
            fitting += [] if reasons else [engines]
        refused.append((len(reasons), -folder.stat().st_mtime, f"{folder.name}: {'; '.join(reasons)}"))
    if fitting:
        return max(fitting, key=lambda engines: (len(engines.files), engines.identity.lean is api.is_lean))
    if not refused:
        return f"{bundle.path} has no TensorRT engines"
    others = f" ({len(refused) - 1} more do not fit either)" if len(refused) > 1 else ""
    return f"no engines in {bundle.path} fit this machine: {min(refused)[2]}{others}"


def mismatches(identity: Identity, bundle: Bundle, api: Api, device: Device) -> list[str]:
    """Why engines of this identity must not be loaded, field by field; empty if they fit."""
    wanted = identify(bundle, api, device.name, [device.capability], graphs=tuple(bundle.manifest.graphs))
    return [*_other_machine(identity, device), *_other_version(identity, api), *_other_content(identity, wanted)]


def _other_machine(identity: Identity, device: Device) -> list[str]:
    here = f"{device.name} ({describe_capabilities([device.capability])})"
    if identity.device not in (None, device.name):
        return [f"built for {identity.device}, this is {here}"]
    if device.capability not in identity.capabilities:
        return [f"compiled for compute capability {describe_capabilities(identity.capabilities)}, this is {here}"]
    return []


def _other_version(identity: Identity, api: Api) -> list[str]:
    built = f"{TITLES.get(identity.flavour, identity.flavour)} {identity.version}"
    if api.is_lean and identity.flavour == "tensorrt":
        if not identity.lean:
            return [f"built by {built} without --lean, so the lean runtime does not load them"]
        same = identity.version.split(".", 1)[0] == str(api.version[0])
        return [] if same else [f"built by {built}, the lean runtime is of {api.version[0]}.x"]
    if (identity.flavour, identity.version) != (api.name, api.version_text):
        return [f"built by {built}, installed is {api.title}"]
    return []


def _other_content(identity: Identity, wanted: Identity) -> list[str]:
    reasons = []
    if identity.weights != wanted.weights:
        reasons.append("the bundle's weights have changed since")
    if identity.precision != wanted.precision:
        reasons.append(f"built in {identity.precision}, the bundle is {wanted.precision}")
    for graph, digest in identity.graphs.items():
        if graph not in wanted.graphs:
            reasons.append(f"the bundle has no graph {graph}")
        elif digest != wanted.graphs[graph]:
            reasons.append(f"graph {graph} has changed since")
        elif not _covered(identity.profiles.get(graph, ()), wanted.profiles[graph]):
            reasons.append(f"graph {graph} was built for other shapes than the contract has")
    return reasons


def _covered(built: Sequence[Profile], wanted: Sequence[Profile]) -> bool:
    return all(any(profile.covers(needed) for profile in built) for needed in wanted)
