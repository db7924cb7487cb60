"""Engines on disk: BUNDLE/engines/KEY/ with engine.json, three engines and the builder's logs.

The key is a hash of everything that an engine depends on. engine.json holds the same facts one by one, so that engines
that do not fit are refused with the reason. The weights' hash is the manifest's, whose sizes are checked when a bundle
is opened; `verify` hashes the engines themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ki_edge.bundle import Bundle, sha256
from ki_edge.errors import BackendError

from .api import TITLES, Api, Capability, describe_capabilities
from .profiles import Profile, profiles

FOLDER = "engines"
RECORD = "engine.json"
SCHEMA = 1
Profiles = Mapping[str, Sequence[Profile]]


@dataclass(frozen=True)
class Device:
    """A GPU as engines know it. `memory` in bytes, None if it is not known."""

    name: str
    capability: Capability
    memory: int | None = None


@dataclass(frozen=True)
class Identity:
    """Everything that engines depend on. `device` None: any GPU of these compute capabilities (TensorRT-RTX)."""

    weights: str  # sha256
    graphs: Mapping[str, str]  # graph -> sha256
    precision: str
    profiles: Profiles
    device: str | None
    capabilities: tuple[Capability, ...]
    flavour: str  # module name
    version: str
    lean: bool = False  # also runs in the lean runtime

    @property
    def key(self) -> str:
        """Name of the folder: 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """JSON form; `from_json` reads it back."""
        shapes = {graph: [profile.to_json() for profile in found] for graph, found in self.profiles.items()}
        plain = {name: value for name, value in self.__dict__.items() if name != "profiles"}
        return {**plain, "capabilities": [list(c) for c in self.capabilities], "profiles": shapes}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Identity:
        """Read `to_json`'s form; KeyError, TypeError or BackendError if it is none."""
        shapes = {graph: tuple(map(Profile.from_json, found)) for graph, found in content["profiles"].items()}
        capabilities = tuple((int(major), int(minor)) for major, minor in content["capabilities"])
        return cls(**{**content, "profiles": shapes, "capabilities": capabilities})


@dataclass(frozen=True)
class EngineFile:
    """One compiled graph. `weights`: bytes of weights in its graph; `seconds` that compiling took."""

    file: str
    size: int
    sha256: str
    weights: int
    seconds: float


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
        """Read a folder; BackendError if its engine.json is damaged or of another schema."""
        try:
            content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise BackendError(f"{folder}: {RECORD} has schema {content['schema']}, this version reads {SCHEMA}")
            files = {str(graph): EngineFile(**facts) for graph, facts in content["graphs"].items()}
            found = cls(folder, Identity.from_json(content["identity"]), files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BackendError(f"{folder}: {RECORD} cannot be read ({error!r})") from None
        if any(Path(facts.file).name != facts.file for facts in files.values()):
            raise BackendError(f"{folder}: {RECORD} names a file outside of its folder")
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
        raise BackendError(f"{found}; build them here: {build_command(bundle, api)}")
    return found


def build_command(bundle: Bundle, api: Api) -> str:
    """What to type to build engines for this machine."""
    return f"ki-export --build {bundle.path}" + (" --target trt-rtx" if api.is_rtx else "")


def look(bundle: Bundle, api: Api, device: Device, *, verify: bool = False) -> Engines | str:
    """Engines that fit, of several those with most graphs; or the reason why there are none."""
    fitting: list[Engines] = []
    refused: list[tuple[int, float, str]] = []
    for folder in sorted(path.parent for path in (bundle.path / FOLDER).glob(f"[!.]*/{RECORD}")):
        try:
            engines = Engines.read(folder)
            reasons = [*mismatches(engines.identity, bundle, api, device), *engines.damage(verify)]
        except BackendError as error:
            reasons = [str(error)]
        else:
            fitting += [] if reasons else [engines]
        refused.append((len(reasons), -folder.stat().st_mtime, f"{folder.name}: {'; '.join(reasons)}"))
    if fitting:
        return max(fitting, key=lambda engines: len(engines.files))
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
        major = identity.version.split(".", 1)[0] == str(api.version[0])
        lean = identity.lean and major
        return [] if lean else [f"built by {built} without the lean runtime of {api.version[0]}.x in mind"]
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
