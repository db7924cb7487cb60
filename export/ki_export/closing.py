"""What an export says when it is done: what was written, how far the actions are off, and what to do next."""

from __future__ import annotations

from collections.abc import Iterator
from shlex import quote

from ki_edge.bundle import Bundle
from ki_export.parity.headline import in_words
from ki_runtime.backends.variant import FIELD as INFERENCE

from .options import ON_CPU


def closing_lines(bundle: Bundle, seconds: float) -> Iterator[str]:
    """Size, time and digest, the verdict, and where it can be read."""
    manifest, path = bundle.manifest, quote(str(bundle.path))
    size = sum(facts["size"] for facts in manifest.files.values())
    how = manifest.provenance["weights"]
    yield f"{path}: {size / 1e6:.1f} MB (weights {how}), {seconds:.0f} s, digest {bundle.digest}"
    if not manifest.parity["verified"]:
        yield f"not verified; to compare it later: ki-parity {path} --checkpoint CHECKPOINT"
        return
    yield in_words(manifest.parity["actions"])
    asked = manifest.sampling.get(INFERENCE)
    if asked is not None:
        yield f"the graphs are float32; OpenVINO rounds products to {asked} where it runs them, and is proven there"
    yield f"report: {path}/parity.html"


def next_lines(bundle: Bundle, target: str, *, built: bool, ahead: bool) -> Iterator[str]:
    """The commands to go on with. `built`: the engines are there, `ahead`: for GPUs that need not be here."""
    path, name = quote(str(bundle.path)), quote(bundle.path.resolve().name)
    elsewhere = target not in ON_CPU and (ahead or not built)
    if elsewhere:
        yield f"next: copy the bundle to the robot (rsync -a {path} ROBOT:), and there:"
        yield f"  ki-doctor {name}"
        path = name
    if target not in ON_CPU and not built:
        flag = "" if target == "trt" else f" --target {target}"
        yield f"  ki-build {name}{flag}    (or let the first ki-run do it)"
    head = "  " if elsewhere else "next: "
    if bundle.manifest.contract is None:
        place = bundle.path.resolve().name if elsewhere else str(bundle.path)
        yield f"{head}ki_runtime.Sampler.open({place!r}) in Python; a bundle of the model alone drives no robot"
    else:
        yield f"{head}ki-run {path} --robot NAME"
