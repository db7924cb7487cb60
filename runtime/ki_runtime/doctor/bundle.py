"""One bundle on this machine: its files, its memory, and the engines that lie in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ki_edge.bundle import Bundle
from ki_edge.errors import BackendError, KiEdgeError
from ki_runtime.gpu.device import Device, describe_capabilities
from ki_runtime.trt.api import TITLES, Api
from ki_runtime.trt.engines import ACTING, FAST, Engines, default_graphs
from ki_runtime.trt.memory import OVERHEAD, needed
from ki_runtime.trt.requirements import GraphFacts, check_graph, graph_facts
from ki_runtime.trt.selection import EngineSet, build_command, folders_in, look, mismatches

from .finding import Finding, in_bytes
from .gpu import Gpu
from .host import Host
from .memory import Needs, needs
from .system import Memory

NAME, ENGINES = "bundle", "engines"


@dataclass(frozen=True)
class Contents:
    """An opened bundle, its graphs as the manifest says, and what they need."""

    bundle: Bundle
    graphs: Mapping[str, GraphFacts]
    needs: Needs

    @property
    def precision(self) -> str:
        return self.bundle.manifest.precision


@dataclass(frozen=True)
class Fit:
    """Of one TensorRT module: whether the bundle's engines fit, or could be built here; `reason` if neither."""

    ready: bool
    buildable: bool
    reason: str = ""


def check_bundle(folder: Path) -> tuple[Contents | None, Finding]:
    """Its manifest and files."""
    try:
        contents = read_contents(folder)
    except KiEdgeError as error:
        return None, Finding("problem", NAME, str(error), "export the checkpoint again, or copy the bundle again")
    manifest = contents.bundle.manifest
    size = sum(facts["size"] for facts in manifest.files.values())
    verified = bool(manifest.parity.get("verified"))
    text = f"{folder}: {manifest.precision}, {in_bytes(size)}, {'' if verified else 'not '}verified at its export"
    text += f", digest {contents.bundle.digest[:16]}..."
    if verified:
        return contents, Finding("ok", NAME, text)
    return contents, Finding("warning", NAME, text, f"ki-parity {folder} --checkpoint CHECKPOINT")


def read_contents(folder: Path) -> Contents:
    """Open a bundle; BundleError if it is damaged."""
    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    graphs = {name: graph_facts(bundle, name) for name in manifest.graphs}
    return Contents(bundle, graphs, needs(manifest.config, len(manifest.vocabulary.ids), manifest.precision))


def check_room(need: Needs, gpu: Gpu | None, memory: Memory | None) -> Finding | None:
    """Whether acting fits into the GPU's memory, or the host's where it has none of its own."""
    own = gpu is not None and not gpu.shared
    have = gpu.memory if gpu is not None and own else memory.available if memory is not None else None
    if have is None:
        return None
    fast = f", with FAST {in_bytes(need.with_fast)}" if need.with_fast > need.acting else ""
    text = (
        f"acting takes {in_bytes(need.acting)}{fast} (weights, K/V, activations; estimated); "
        f"{in_bytes(have)} {'on the GPU' if own else 'available'}"
    )
    if need.acting > have:
        fix = "stop other programs, export with --embeddings host or a smaller --precision, or use a larger board"
        if need.sequential <= have:
            fits = f"--sequential takes {in_bytes(need.sequential)} and loads before every chunk"
            found = f"too little at once: {text}; {fits}"
            return Finding("warning", "model memory", found, f"run it with --sequential, or {fix}")
        return Finding("problem", "model memory", f"too little: {text}", fix)
    if need.with_fast > have:
        fix = "do not call infer_fast here: the engine for FAST is loaded at its first use"
        if need.sequential_with_fast <= have:
            fix += f"; or run it with --sequential, {in_bytes(need.sequential_with_fast)}, loading before every chunk"
        return Finding("warning", "model memory", text, fix)
    return Finding("ok", "model memory", text)


def check_engines(host: Host, contents: Contents, api: Api, gpu: Gpu, memory: Memory | None) -> tuple[Fit, Finding]:
    """Do the bundle's engines fit this GPU and this TensorRT, and if not, can they be built here."""
    device = _device(gpu)
    found = look(contents.bundle, api, device)
    if isinstance(found, EngineSet):
        which = f"{api.title}: {', '.join(folder.name for folder in found.folders)} fits"
        if FAST not in default_graphs(contents.bundle):
            return Fit(True, True), Finding("ok", ENGINES, which)
        fast = look(contents.bundle, api, device, (FAST,))
        if isinstance(fast, EngineSet):
            return Fit(True, True), Finding("ok", ENGINES, f"{which}, and for FAST {fast.folders[0].name}")
        command = build_command(contents.bundle, api, (FAST,))
        return Fit(True, True), Finding("warning", ENGINES, f"{which}; FAST: {fast}", command)
    obstacle = _obstacle(host, contents, api, gpu, memory)
    if obstacle is not None:
        why, fix = obstacle
        return Fit(False, False, why), Finding("problem", ENGINES, f"{found}; cannot be built here: {why}", fix)
    return Fit(False, True), Finding("warning", ENGINES, found, build_command(contents.bundle, api))


def list_engines(contents: Contents, packages: Mapping[str, Api], gpu: Gpu | None) -> Iterator[Finding]:
    """The engines that lie in the bundle, also those for other machines: of which graphs, by what, for what."""
    for folder, engines in folders_in(contents.bundle):
        if isinstance(engines, str):
            yield Finding("warning", "engine files", engines, f"rm -r {folder}, and build them again")
            continue
        made = engines.identity
        target = made.device or f"compute capability {describe_capabilities(made.capabilities)} (ahead of time)"
        size = in_bytes(sum(facts.size for facts in engines.files.values()))
        text = f"{folder.name}: {', '.join(engines.files)}, {size}, {TITLES.get(made.flavour, made.flavour)} "
        text += f"{made.version} for {target}: "
        reason = _why_unusable(contents.bundle, engines, packages, gpu)
        yield Finding("ok", "engine files", text + (f"not usable here, {reason}" if reason else "usable here"))


def _why_unusable(bundle: Bundle, engines: Engines, packages: Mapping[str, Api], gpu: Gpu | None) -> str | None:
    if gpu is None:
        return "there is no GPU"
    made = engines.identity
    apis = [api for api in packages.values() if api.name == made.flavour or (made.lean and api.is_lean)]
    if not apis:
        return f"{TITLES.get(made.flavour, made.flavour)} is not installed"
    device, reasons = _device(gpu), [*engines.damage()]
    for api in apis:
        found = [why for graph in engines.files for why in mismatches(made, graph, bundle, api, device)]
        if not found and not reasons:
            return None
        reasons += found
    return reasons[0]


def _device(gpu: Gpu) -> Device:
    return Device(gpu.name, gpu.capability, gpu.memory, gpu.shared, gpu.multiprocessors)


def _obstacle(host: Host, contents: Contents, api: Api, gpu: Gpu, memory: Memory | None) -> tuple[str, str] | None:
    """What keeps engines from being built here, and the fix; None if nothing does."""
    folder = contents.bundle.path
    if not api.can_build:
        return f"{api.title} has no builder", f"{build_command(contents.bundle, api)}, of the same major version"
    if api.is_rtx and gpu.capability not in api.capabilities:
        return f"{api.title} does not compile for {gpu.sm}", "use TensorRT"
    try:
        for name in ACTING:
            check_graph(api, name, contents.graphs[name])
    except BackendError as error:
        return str(error), "upgrade TensorRT, or export again as the message says"
    sizes = [contents.graphs[name].weight_bytes for name in ACTING]  # what else is built may fail
    disk, free = sum(sizes) + int(OVERHEAD), host.free_bytes(folder)
    if disk > free:
        return f"engines need {in_bytes(disk)} of disk", f"free {in_bytes(disk - free)} at {folder}"
    need, have = max(needed(api, size, shared=gpu.shared) for size in sizes), memory.with_swap if memory else None
    if have is not None and need > have:
        more = -(-(need - have) // 10**9)
        swap = f"sudo fallocate -l {more}G /swap && sudo chmod 600 /swap && sudo mkswap /swap && sudo swapon /swap"
        return f"compiling takes up to {need / 1e9:.1f} GB of memory, {have / 1e9:.1f} GB are free", swap
    if not host.usable(str(folder)):
        return f"{folder} cannot be written by this user", f"sudo chown -R $USER {folder}"
    return None
