"""What OpenVINO has left beside a bundle: compiled graphs, and whether it was measured to be the faster engine."""

from __future__ import annotations

from collections.abc import Iterator

from ki_edge.bundle import Bundle
from ki_runtime.backends.choice import find_choice
from ki_runtime.backends.registry import on_cpu
from ki_runtime.backends.variant import wished
from ki_runtime.openvino.cache import kept
from ki_runtime.openvino.session import folder_of

from .finding import Finding

NAME = "OpenVINO"


def check_compiled(bundle: Bundle) -> Iterator[Finding]:
    """How much lies in its folder, and which engine `auto` takes on this CPU."""
    count, size = kept(folder_of(bundle))
    if count:
        yield Finding("ok", NAME, f"{count} compiled graphs, {size / 1e6:.1f} MB, beside the bundle")
    rivals = on_cpu()
    choice = find_choice(bundle, rivals)
    if choice is not None:
        slower = "; ".join(f"{rival.name}: {why}" for rival in rivals if (why := choice.against(rival.name)))
        yield Finding("ok", "auto", f"takes {choice.fastest} on this CPU; {slower}")
    elif wished(bundle) is None and sum(rival.obstacle(bundle) is None for rival in rivals) > 1:
        yield Finding("ok", "auto", "measures at its first start which engine for the CPU is faster")
