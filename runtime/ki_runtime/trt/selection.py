"""Which of the engines in a bundle fit this machine: for each graph on its own, and why the others do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ki_edge.bundle import Bundle
from ki_edge.errors import BackendError
from ki_runtime.backends.trust import built_here
from ki_runtime.gpu.device import Device, describe_capabilities

from .api import TITLES, Api
from .engines import ACTING, FOLDER, RECORD, Engines, default_graphs, identify
from .identity import Identity
from .profiles import Profile

Graphs = Sequence[str]  # names


@dataclass(frozen=True)
class EngineSet:
    """The engines of some graphs, each in the folder that holds it."""

    of: Mapping[str, Engines]  # graph -> the engines among which its own is

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where they lie."""
        return tuple(dict.fromkeys(engines.folder for engines in self.of.values()))

    def path(self, graph: str) -> Path:
        """File of one graph's engine."""
        return self.of[graph].path(graph)


def find(
    bundle: Bundle, api: Api, device: Device, graphs: Graphs = ACTING, *, verify: bool = False, trust: bool = False
) -> EngineSet:
    """Engines of these graphs of the bundle, for this GPU and this TensorRT. Arguments as of `look`.

    BackendError with the reason why those on disk do not fit, or that there are none, and the command that builds them.
    """
    found = look(bundle, api, device, graphs, verify=verify, trust=trust)
    if isinstance(found, str):
        here = "" if api.is_lean else " here"
        raise BackendError(f"{found}; build them{here}: {build_command(bundle, api, graphs)}")
    return found


def build_command(bundle: Bundle, api: Api, graphs: Graphs = ACTING) -> str:
    """What to type to build engines of these graphs for this machine."""
    more = "" if set(graphs) <= set(default_graphs(bundle)) else f" --graphs {','.join(graphs)}"
    more += " --target trt-rtx" if api.is_rtx else " --lean (run where tensorrt is installed)" if api.is_lean else ""
    return f"ki-build {bundle.path}{more}"


def look(
    bundle: Bundle, api: Api, device: Device, graphs: Graphs = ACTING, *, verify: bool = False, trust: bool = False
) -> EngineSet | str:
    """For each graph an engine that fits, not one made for the lean runtime unless this is it; of several, the one
    that lies with most of the others.

    The reason why if one has none. `verify` also compares hashes, of engines for the lean runtime always; those bring
    code of the host's, so they must have been built here, or be wanted all the same (`trust`).
    """
    read = [_read(folder) for folder in _folders(bundle)]
    chosen: dict[str, Engines] = {}
    for graph in graphs:
        fitting: list[Engines] = []
        refused: list[tuple[int, float, str]] = []
        for folder, age, engines in read:
            if isinstance(engines, str):
                reasons = [engines]
            elif graph not in engines.files:
                continue
            else:
                reasons = [
                    *mismatches(engines.identity, graph, bundle, api, device),
                    *_damage(engines, graph, verify=verify, trust=trust),
                ]
                fitting += [] if reasons else [engines]
            refused.append((len(reasons), age, f"{folder.name}: {'; '.join(reasons)}"))
        if not fitting:
            return _why_none(bundle, graph, refused, bool(read))
        chosen[graph] = max(fitting, key=lambda e: (e.identity.lean is api.is_lean, len(set(graphs) & set(e.files))))
    return EngineSet(chosen)


def folders_in(bundle: Bundle) -> list[tuple[Path, Engines | str]]:
    """Every folder of engines in a bundle, with them or why they cannot be read."""
    return [(folder, engines) for folder, _, engines in map(_read, _folders(bundle))]


def _folders(bundle: Bundle) -> list[Path]:
    return sorted(path.parent for path in (bundle.path / FOLDER).glob(f"[!.]*/{RECORD}"))


def _read(folder: Path) -> tuple[Path, float, Engines | str]:
    """The folder, how old it is (less is younger), and its engines or why they cannot be read."""
    try:
        return folder, -folder.stat().st_mtime, Engines.read(folder)
    except (BackendError, OSError) as error:
        return folder, 0.0, str(error)


def _damage(engines: Engines, graph: str, *, verify: bool, trust: bool) -> list[str]:
    lean = engines.identity.lean
    try:
        found = engines.damage(verify or lean, (graph,))
    except OSError as error:
        found = [str(error)]
    if lean and not found and not trust and not built_here(engines.files[graph].sha256):
        found.append(
            "made for the lean runtime, not by this user on this machine: loading them runs code that they bring; "
            "--trust-engines loads them all the same"
        )
    return found


def _why_none(bundle: Bundle, graph: str, refused: list[tuple[int, float, str]], others: bool) -> str:
    if not refused:
        return f"{bundle.path} has no TensorRT {f'engine of {graph}' if others else 'engines'}"
    more = f" ({len(refused) - 1} more do not fit either)" if len(refused) > 1 else ""
    return f"no engine of {graph} in {bundle.path} fits this machine: {min(refused)[2]}{more}"


def mismatches(identity: Identity, graph: str, bundle: Bundle, api: Api, device: Device) -> list[str]:
    """Why the engine of one graph must not be loaded, field by field; empty if it fits."""
    wanted = identify(bundle, api, device, [device.capability], graphs=tuple(bundle.manifest.graphs))
    content = _other_content(identity, graph, wanted)
    return [*_other_machine(identity, device), *_other_version(identity, api), *content]


def _other_machine(identity: Identity, device: Device) -> list[str]:
    if identity.device not in (None, device.name):
        return [f"built for {identity.device}, this is {device.describe()}"]
    if device.capability not in identity.capabilities:
        built = describe_capabilities(identity.capabilities)
        return [f"compiled for compute capability {built}, this is {device.describe()}"]
    pairs = [(identity.multiprocessors, device.multiprocessors), (identity.memory, device.memory_class)]
    if any(None not in pair and pair[0] != pair[1] for pair in pairs):
        built = f"{identity.multiprocessors} multiprocessors and {identity.memory} GB"
        return [f"built for another board or power mode, {identity.device} with {built}; this is {device.describe()}"]
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


def _other_content(identity: Identity, graph: str, wanted: Identity) -> list[str]:
    reasons = []
    if identity.weights != wanted.weights:
        reasons.append("the bundle's weights have changed since")
    if identity.precision != wanted.precision:
        reasons.append(f"built in {identity.precision}, the bundle is {wanted.precision}")
    if graph not in wanted.graphs:
        reasons.append(f"the bundle has no graph {graph}")
    elif identity.graphs[graph] != wanted.graphs[graph]:
        reasons.append(f"graph {graph} has changed since")
    elif not _covered(identity.profiles.get(graph, ()), wanted.profiles[graph]):
        reasons.append(f"graph {graph} was built for other shapes than the contract has")
    return reasons


def _covered(built: Sequence[Profile], wanted: Sequence[Profile]) -> bool:
    return all(any(profile.covers(needed) for profile in built) for needed in wanted)
