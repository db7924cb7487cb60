"""Bundle to engines: by ki-build, by ki-run at its first start, or ahead of time with TensorRT-RTX.

Each graph becomes an engine of its own. TensorRT shares no weights between engines, so fast_decode, whose transformer
is the prefix's, holds them a second time on disk, and on the device from its first use on. It is built where the
contract has FAST, or where somebody asks for it, and after the engines that act, in a folder of its own: what goes
wrong with it costs nobody the others.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ki_edge.bundle import Bundle
from ki_edge.errors import ArgumentError, BackendError, KiEdgeError
from ki_edge.files.publishing import publishing
from ki_runtime.backends.trust import remember
from ki_runtime.gpu.device import Capability, Device, check_precision, describe_capabilities, parse_capabilities

from .api import Api
from .compiling import Settings, compile_graph
from .engines import ACTING, FOLDER, RECORD, Engines, default_graphs, identify
from .identity import EngineFile, Identity
from .memory import check_disk, check_memory, check_size, estimate
from .profiles import profiles
from .requirements import GraphFacts, check_graph, graph_facts
from .selection import EngineSet, build_command, look
from .targets import MODULES, capabilities_of, meant, this_device

Say = Callable[[str], object]


@dataclass(frozen=True)
class BuildOptions:
    """How to build. `capabilities`: compile ahead of time for these GPUs (TensorRT-RTX only), not for this machine's.

    `graphs`: which ones, None for `default_graphs`; `batch`: most observations at once; `workspace`: bytes that one
    layer may take while it runs; `lean`: engines that the lean runtime loads too; `ignore_memory`: build though the
    estimate says that memory will not do; `force`: build again what is there already.
    """

    capabilities: tuple[Capability, ...] = ()
    graphs: tuple[str, ...] | None = None
    batch: int = 1
    workspace: int = 1 << 30
    lean: bool = False
    ignore_memory: bool = False
    force: bool = False


def build_bundle(
    path: str | Path,
    target: str = "trt",
    compute_capability: str | None = None,
    options: BuildOptions | None = None,
    say: Say = lambda _: None,
) -> EngineSet:
    """What `ki-build` does. `target` "trt" or "trt-rtx"; `compute_capability` such as "8.6,12.0", for RTX.

    Errors as of `build`, and ArgumentError for a target or capability that does not exist.
    """
    if target not in MODULES:
        raise ArgumentError(f"target {target!r}: engines are built for {' and '.join(MODULES)}{meant(target)}")
    options = options or BuildOptions()
    if compute_capability is not None:
        options = replace(options, capabilities=parse_capabilities(compute_capability))
    bundle, api = Bundle.open(path), Api.load(MODULES[target])
    return build(bundle, api, None if options.capabilities else this_device(api), options, say)


def ensure_engines(
    bundle: Bundle, api: Api, device: Device, say: Say = lambda _: None, *, verify: bool = False, trust: bool = False
) -> EngineSet:
    """The engines that act and fit this machine, built if they are missing (with a bar on a terminal, lines to `say`).

    Arguments as of `look`. BackendError if they cannot be built here.
    """
    found = look(bundle, api, device, verify=verify, trust=trust)
    if isinstance(found, EngineSet):
        return found
    if not api.can_build:
        raise BackendError(f"{found}, and {api.title} cannot build any: {build_command(bundle, api)}")
    say(found)
    # those of the right size whose hashes differ are no engines that are there
    return build(bundle, api, device, BuildOptions(force=verify), say)


def rebuild(bundle: Bundle, api: Api, device: Device, broken: Engines, say: Say = lambda _: None) -> Engines:
    """Engines in the place of those that TensorRT does not load; the same graphs for the same GPUs.

    BackendError if they cannot be built; the broken ones stay then.
    """
    options = BuildOptions(
        capabilities=broken.identity.capabilities if api.is_rtx else (),
        batch=broken.identity.batch,
        lean=broken.identity.lean,
        force=True,
    )
    made = _build_folder(bundle, api, device, options, tuple(broken.identity.graphs), say)
    if made.folder != broken.folder:
        shutil.rmtree(broken.folder, ignore_errors=True)
    return made


def build(
    bundle: Bundle, api: Api, device: Device | None, options: BuildOptions | None = None, say: Say = lambda _: None
) -> EngineSet:
    """Compile a bundle's graphs and publish the engines in it: first those that act, then fast_decode.

    `device`: this machine's GPU, None to compile ahead of time. `say` gets a line for the plan and for each graph.
    BackendError in one line if anything the build needs is missing, too old or too small, or if the builder fails;
    nothing is left of a folder that failed or was interrupted, those before it stay. A fast_decode that nobody asked
    for by name and that cannot be built is a line to `say`.
    """
    options = options or BuildOptions()
    wanted = _graphs(bundle, options)
    groups = [tuple(name for name in wanted if (name in ACTING) is acting) for acting in (True, False)]
    made: dict[str, Engines] = {}
    for names in filter(None, groups):
        try:
            engines = _build_folder(bundle, api, device, options, names, say)
        except KiEdgeError as error:
            if not made:
                raise
            there = f"the engines of {', '.join(made)} are built and act without it"
            if options.graphs is not None:
                raise BackendError(f"{error}; {there}") from error
            say(f"no engine of {', '.join(names)}: {error}; {there}")
            break
        made |= dict.fromkeys(names, engines)
    return EngineSet(made)


def _build_folder(
    bundle: Bundle, api: Api, device: Device | None, options: BuildOptions, names: tuple[str, ...], say: Say
) -> Engines:
    """Compile these graphs into one folder, all or nothing, unless they are there."""
    capabilities = capabilities_of(api, device, options.capabilities, lean=options.lean)
    check_precision(bundle.manifest.precision, capabilities)
    graphs = {name: graph_facts(bundle, name) for name in names}
    shapes = profiles(bundle, options.batch)
    identity = identify(bundle, api, device, capabilities, profiles=shapes, graphs=names, lean=options.lean)
    folder = bundle.path / FOLDER / identity.key
    existing = None if options.force else _existing(folder)
    if existing is not None:
        say(f"{folder}: engines are there already")
        return existing
    for name, graph in graphs.items():
        check_graph(api, name, graph)
        if not options.ignore_memory:
            check_memory(api, name, graph.weight_bytes, device)
    with publishing(folder, _check_replaceable, BackendError) as partial:
        check_disk(partial, sum(graph.weight_bytes for graph in graphs.values()))
        _announce(api, identity, graphs, device, say)
        _compile(bundle, api, identity, graphs, options, partial, say)
    made = Engines.read(folder)
    if options.lean:
        _remember(made, say)
    return made


def _remember(made: Engines, say: Say) -> None:
    """That these engines, which bring code of the host's, are ours."""
    try:
        for facts in made.files.values():
            remember(facts.sha256)
    except (OSError, RuntimeError) as error:
        say(f"it cannot be written down that these engines were built here ({error}): they need --trust-engines")


def _compile(
    bundle: Bundle,
    api: Api,
    identity: Identity,
    graphs: dict[str, GraphFacts],
    options: BuildOptions,
    folder: Path,
    say: Say,
) -> None:
    settings = Settings(options.workspace, identity.capabilities, options.lean, _timings(folder.parent, identity))
    files: dict[str, EngineFile] = {}
    for name, graph in graphs.items():
        path, log = folder / f"{name}.engine", folder / f"{name}.log"
        made = compile_graph(api, bundle.graph(name), identity.profiles[name], path, log, settings)
        check_size(name, made.size, graph.weight_bytes, identity.precision, say)
        files[name] = EngineFile(path.name, made.size, made.sha256, graph.weight_bytes, round(made.seconds, 1))
        sizes = f"{made.size / 1e6:.1f} MB for {graph.weight_bytes / 1e6:.1f} MB of weights"
        say(f"compiled {name}: {sizes} ({made.seconds:.1f} s)")
    Engines(folder, identity, files).write()


def _announce(api: Api, identity: Identity, graphs: dict[str, GraphFacts], device: Device | None, say: Say) -> None:
    where = identity.device or f"compute capability {describe_capabilities(identity.capabilities)}"
    cost = estimate(api, [graph.weight_bytes for graph in graphs.values()], device)
    say(f"compiling {', '.join(graphs)} with {api.title} for {where}: {cost}")


def _graphs(bundle: Bundle, options: BuildOptions) -> tuple[str, ...]:
    known = tuple(bundle.manifest.graphs)
    wanted = default_graphs(bundle) if options.graphs is None else tuple(dict.fromkeys(options.graphs))
    for name in wanted:
        if name not in known:
            raise ArgumentError(f"no graph {name!r} in {bundle.path}, only {', '.join(known)}")
    if not wanted:
        raise ArgumentError(f"no graph to build: name some of {', '.join(known)}")
    return wanted


def _existing(folder: Path) -> Engines | None:
    try:
        engines = Engines.read(folder)
    except BackendError:
        return None
    return None if engines.damage() else engines


def _check_replaceable(folder: Path) -> None:
    if not (folder / RECORD).is_file():
        raise BackendError(f"{folder} exists and has no {RECORD}, so it holds no engines: remove it yourself")


def _timings(folder: Path, identity: Identity) -> Path:
    gpu = f"{identity.device} {identity.multiprocessors} {identity.memory}"
    name = re.sub(r"[^a-z0-9.]+", "-", f"{gpu} {identity.flavour} {identity.version}".lower())
    return folder / f"{name}.timings"
