"""Bundle to engines: on the robot at first start, with `ki-export --build`, or ahead of time with TensorRT-RTX.

All three graphs are compiled by default, each into an engine of its own: TensorRT has no weights shared between
engines, so fast_decode, whose transformer is the prefix's, holds them a second time on disk, and on the device from
its first use on. Leave it out with `graphs` where nobody decodes FAST tokens.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from ki_edge.bundle import Bundle
from ki_edge.errors import ArgumentError, BackendError
from ki_edge.publishing import publishing

from .api import Api, Capability, describe_capabilities, parse_capabilities
from .compiling import Settings, compile_graph
from .engines import FOLDER, RECORD, Device, Engines, build_command, identify, look
from .graph_file import GraphFile, read_graph
from .identity import EngineFile, Identity
from .memory import check_disk, check_memory, check_size, estimate
from .profiles import profiles
from .requirements import check_graph, check_precision

Say = Callable[[str], object]
MODULES = {"trt": "tensorrt", "trt-rtx": "tensorrt_rtx"}


@dataclass(frozen=True)
class BuildOptions:
    """How to build. `capabilities`: compile ahead of time for these GPUs (TensorRT-RTX only), not for this machine's.

    `graphs`: which ones, None for all; `batch`: most observations at once; `workspace`: bytes that one layer may take
    while it runs; `lean`: engines that the lean runtime loads too; `ignore_memory`: build though the estimate says that
    memory will not do; `force`: build again what is there already.
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
) -> Engines:
    """What `ki-export --build` does. `target` "trt" or "trt-rtx"; `compute_capability` such as "8.6,12.0", for RTX.

    Errors as of `build`, and ArgumentError for a target or capability that does not exist.
    """
    if target not in MODULES:
        raise ArgumentError(f"target {target!r}: engines are built for {', '.join(MODULES)}")
    options = options or BuildOptions()
    if compute_capability is not None:
        options = BuildOptions(**{**options.__dict__, "capabilities": parse_capabilities(compute_capability)})
    bundle, api = Bundle.open(path), Api.load(MODULES[target])
    return build(bundle, api, None if options.capabilities else _device(api), options, say)


def check_ahead(compute_capability: str, precision: str) -> None:
    """Before an export: whether TensorRT-RTX can compile for this list. `precision` as manifests call it.

    ArgumentError or BackendError as `build_bundle` would raise them.
    """
    api, wanted = Api.load(MODULES["trt-rtx"]), parse_capabilities(compute_capability)
    _check_known(api, wanted)
    check_precision(precision, wanted)


def ensure_engines(
    bundle: Bundle, api: Api, device: Device, say: Say = lambda _: None, *, verify: bool = False
) -> Engines:
    """The engines that fit this machine, built if there are none (with a bar on a terminal, and lines to `say`).

    `verify`: engines whose hashes differ do not fit. BackendError if they cannot be built here.
    """
    found = look(bundle, api, device, verify=verify)
    if isinstance(found, Engines):
        return found
    if not api.can_build:
        raise BackendError(f"{found}, and {api.title} cannot build any: {build_command(bundle, api)}")
    say(found)
    return build(bundle, api, device, say=say)


def rebuild(bundle: Bundle, api: Api, device: Device, broken: Engines, say: Say = lambda _: None) -> Engines:
    """Engines in the place of those that TensorRT does not load; the same graphs for the same GPUs.

    BackendError if they cannot be built; the broken ones stay then.
    """
    options = BuildOptions(
        capabilities=broken.identity.capabilities if api.is_rtx else (),
        graphs=tuple(broken.identity.graphs),
        lean=broken.identity.lean,
        force=True,
    )
    made = build(bundle, api, device, options, say)
    if made.folder != broken.folder:
        shutil.rmtree(broken.folder, ignore_errors=True)
    return made


def build(
    bundle: Bundle,
    api: Api,
    device: Device | None,
    options: BuildOptions | None = None,
    say: Say = lambda _: None,
) -> Engines:
    """Compile a bundle's graphs and publish the engines in it, all or nothing.

    `device`: this machine's GPU, None to compile ahead of time. `say` gets a line for the plan and for each graph.
    BackendError in one line if anything the build needs is missing, too old or too small, or if the builder fails;
    nothing is left of a failed or interrupted build.
    """
    options = options or BuildOptions()
    capabilities = _capabilities(api, device, options)
    check_precision(bundle.manifest.precision, capabilities)
    graphs = {name: read_graph(bundle.graph(name)) for name in _graphs(bundle, options)}
    identity = identify(
        bundle,
        api,
        device.name if device is not None else None,
        capabilities,
        profiles=profiles(bundle, options.batch),
        graphs=tuple(graphs),
        lean=options.lean,
    )
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
    return Engines.read(folder)


def _compile(
    bundle: Bundle,
    api: Api,
    identity: Identity,
    graphs: dict[str, GraphFile],
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
        say(f"compiled {name}: {made.size / 1e6:.1f} MB ({made.seconds:.1f} s)")
    Engines(folder, identity, files).write()


def _announce(api: Api, identity: Identity, graphs: dict[str, GraphFile], device: Device | None, say: Say) -> None:
    where = identity.device or f"compute capability {describe_capabilities(identity.capabilities)}"
    cost = estimate(api, [graph.weight_bytes for graph in graphs.values()], device)
    say(f"compiling {', '.join(graphs)} with {api.title} for {where}: {cost}")


def _capabilities(api: Api, device: Device | None, options: BuildOptions) -> tuple[Capability, ...]:
    """What to compile for, or BackendError saying why this TensorRT cannot."""
    if not api.can_build:
        raise BackendError(f"{api.title} only runs engines: build them with tensorrt or tensorrt_rtx")
    if options.capabilities and not api.is_rtx:
        raise BackendError(
            "TensorRT builds only on the GPU that will run the engines: run ki-export --build there, or compile ahead "
            "of time with --target trt-rtx --compute-capability"
        )
    if not options.capabilities and device is None:
        raise BackendError(f"no NVIDIA GPU or driver here: {_elsewhere(api)}")
    if options.lean and api.is_rtx:
        raise BackendError("the lean runtime loads engines of TensorRT, not of TensorRT-RTX")
    wanted = options.capabilities or ((device.capability,) if device is not None else ())
    if api.is_rtx:
        _check_known(api, wanted)
    return wanted


def _check_known(api: Api, wanted: tuple[Capability, ...]) -> None:
    unknown = [capability for capability in wanted if capability not in api.capabilities]
    if unknown:
        raise BackendError(
            f"{api.title} cannot compile for compute capability {describe_capabilities(unknown)}, only for "
            f"{describe_capabilities(api.capabilities)}"
        )


def _graphs(bundle: Bundle, options: BuildOptions) -> tuple[str, ...]:
    known = tuple(bundle.manifest.graphs)
    wanted = known if options.graphs is None else options.graphs
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
    name = re.sub(r"[^a-z0-9.]+", "-", f"{identity.device} {identity.flavour} {identity.version}".lower())
    return folder / f"{name}.timings"


def _device(api: Api) -> Device:
    """This machine's GPU; BackendError where there is none, and what can be done."""
    try:
        device: Device = import_module("ki_runtime.trt.cuda").current_device()
    except BackendError as error:
        raise BackendError(f"{error}; {_elsewhere(api)}") from error
    return device


def _elsewhere(api: Api) -> str:
    ahead = ", or name the GPU to compile for: --compute-capability 8.6" if api.is_rtx else ""
    return f"run ki-export --build BUNDLE on the robot{ahead}"
