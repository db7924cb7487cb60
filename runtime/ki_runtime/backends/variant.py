"""Device and arithmetic that a backend's name may carry: `openvino:GPU`, `openvino:CPU:bf16`, `openvino:bf16`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ki_edge.bundle import Bundle
from ki_edge.errors import BackendError, BundleError

ROUNDINGS: Mapping[str, str] = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}  # as written in a name
DEVICE = re.compile(r"(CPU|GPU|NPU)(\.\d{1,3})?")
FIELD = "inference_precision"  # of the manifest's sampling: what a bundle of float32 graphs asks for
EXAMPLES = "openvino, openvino:GPU, openvino:CPU:bf16"


@dataclass(frozen=True)
class Variant:
    """`device`: "CPU", "GPU", "GPU.1", "NPU". `rounding` of matrix products, "float32" if nobody asks for another.

    `asked`: whether the name says the rounding, rather than the bundle.
    """

    device: str = "CPU"
    rounding: str = "float32"
    asked: bool = False

    def of(self, bundle: Bundle | None) -> Variant:
        """This variant, with the rounding that the bundle asks for where the name did not."""
        wish = None if bundle is None or self.asked else wished(bundle)
        return self if wish is None else replace(self, rounding=wish)

    def __str__(self) -> str:
        return f"{self.device}, {self.rounding}"


def read_variant(text: str, name: str) -> Variant:
    """Of what stands behind the first colon of `name`. BackendError for what is neither a device nor a rounding."""
    found = Variant()
    for at, part in enumerate(text.split(":")):
        if part.lower() in ROUNDINGS and not found.asked:
            found = replace(found, rounding=ROUNDINGS[part.lower()], asked=True)
        elif at == 0 and DEVICE.fullmatch(part.upper()):
            found = replace(found, device=part.upper())
        else:
            known = f"a device (CPU, GPU, GPU.1, NPU), then {', '.join(ROUNDINGS)}"
            raise BackendError(f"backend {name!r:.60}: {part!r:.30} is not known; expected {known}, as in {EXAMPLES}")
    return found


def wished(bundle: Bundle) -> str | None:
    """The rounding that a bundle asks for; None for the graphs' own. BundleError for one that is not known."""
    found = bundle.manifest.sampling.get(FIELD)
    if found is not None and found not in ROUNDINGS.values():
        expected = ", ".join(ROUNDINGS.values())
        raise BundleError(f"{bundle.path}: manifest 'sampling.{FIELD}' {found!r:.40}: expected one of {expected}")
    return found
