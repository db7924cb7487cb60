"""Engines on disk: BUNDLE/engines/KEY/ with engine.json, engines of some graphs and the builder's logs.

The key is a hash of everything that an engine depends on. engine.json holds the same facts one by one, so that engines
that do not fit are refused with the reason. The weights' hash is the manifest's, whose sizes are checked when a bundle
is opened; `damage(verify=True)` hashes the engines themselves. `selection` finds those that fit a machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ki_edge import graphs
from ki_edge.bundle import Bundle, sha256
from ki_edge.errors import BackendError, BundleError
from ki_edge.files.reading import read_object
from ki_edge.files.writing import write_file
from ki_runtime.gpu.device import Capability, Device

from .api import Api
from .identity import EngineFile, Identity, Profiles
from .profiles import profiles

FOLDER = "engines"
RECORD = "engine.json"
SCHEMA = 2  # 1 did not tell boards of one name apart
ACTING, FAST = (graphs.PREFIX.name, graphs.DENOISE.name), graphs.FAST_DECODE.name
MOST_BYTES = 1 << 20  # of engine.json, which takes a few thousand


def default_graphs(bundle: Bundle) -> tuple[str, ...]:
    """The graphs that are built unless somebody names others: those that act, and fast_decode if the contract has FAST.

    A bundle of the model alone says nothing of FAST, so it acts.
    """
    return tuple(name for name in bundle.manifest.graphs if name != FAST or bundle.manifest.decodes_fast)


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
            raise BackendError(f"{self.folder}: built without {graph}, only {built}; build it with ki-build")
        return self.folder / self.files[graph].file

    def damage(self, verify: bool = False, graphs: Sequence[str] | None = None) -> list[str]:
        """What is wrong with the files (of some graphs): missing, truncated, or with `verify` changed."""
        found = []
        for graph, facts in self.files.items():
            if graphs is not None and graph not in graphs:
                continue
            path = self.path(graph)
            size = path.stat().st_size if path.is_file() else None
            if size != facts.size:
                state = "is missing" if size is None else f"has {size} bytes, recorded {facts.size}: it is truncated"
                found.append(f"{path.name} {state}")
            elif verify and sha256(path) != facts.sha256:
                found.append(f"{path.name} has changed since it was built")
        return found

    def write(self) -> None:
        """Write engine.json; BackendError if it cannot be."""
        files = {graph: asdict(facts) for graph, facts in self.files.items()}
        content = {"schema": SCHEMA, "key": self.identity.key, "identity": self.identity.to_json(), "graphs": files}
        write_file(self.folder / RECORD, json.dumps(content, indent=1) + "\n", BackendError)

    @classmethod
    def read(cls, folder: Path) -> Engines:
        """Read a folder; BackendError if its engine.json is damaged, of another schema or of another folder."""
        try:
            content = read_object(folder / RECORD, BundleError, MOST_BYTES)
            if content["schema"] != SCHEMA:
                other = f"{content['schema']!r:.20}"
                raise BackendError(
                    f"{folder}: {RECORD} has schema {other}, this version reads {SCHEMA}: another version of ki-edge "
                    "built them"
                )
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


def identify(
    bundle: Bundle, api: Api, device: Device | None, capabilities: Sequence[Capability], **more: Any
) -> Identity:
    """The identity of engines of a bundle. `more`: profiles, lean, and graphs, the names of those that are built."""
    own = None if api.is_rtx else device
    manifest, names = bundle.manifest, more.pop("graphs", None) or tuple(bundle.manifest.graphs)
    found = more.pop("profiles", None) or profiles(bundle)
    return Identity(
        weights=str(manifest.files[str(manifest.weights["file"])].get("sha256")),
        graphs={name: str(manifest.files[bundle.graph(name).name].get("sha256")) for name in names},
        precision=manifest.precision,
        profiles={name: found[name] for name in names},
        device=own.name if own is not None else None,
        multiprocessors=own.multiprocessors if own is not None else None,
        memory=own.memory_class if own is not None else None,
        capabilities=tuple(sorted(capabilities)),
        flavour=api.name,
        version=api.version_text,
        **more,
    )
