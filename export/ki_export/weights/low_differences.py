"""Whether the eight- and four-bit weights of a bundle are what rounding its checkpoint gives, every byte of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from ki_edge.bundle import Bundle
from ki_edge.checkpoints import TensorSource
from ki_edge.checkpoints.layout.keys import checkpoint_key
from ki_edge.dtypes import BY_ONNX
from ki_edge.errors import BundleError
from ki_edge.files.reading import read_object
from ki_export.passes.static import TYPES

from .low_bits import SCALES, SECOND, VALUES, LowForm, LowWeights
from .rounding import Kind

PLAN = "ranges.json"  # its "low_bits" has the plan, and in it the balances that columns were multiplied by
MAX_PLAN = 1 << 28  # bytes
KINDS = {int(dtype): kind for kind, dtype in TYPES.items()}
Balances = Mapping[str, np.ndarray[Any, np.dtype[np.float32]]]


def differing_low_weights(
    bundle: Bundle, external: Mapping[str, Any], source: TensorSource, exponents: Mapping[str, int]
) -> Iterator[str]:
    """Checkpoint keys of low weights that are not the checkpoint's. `external`: a graph's initializers in the file."""
    found = {name.removesuffix(VALUES): tensor for name, tensor in external.items() if name.endswith(VALUES)}
    low = {name: tensor for name, tensor in found.items() if tensor.data_type in KINDS}
    balances = _balances(bundle) if low else {}
    for name, tensor in low.items():
        key = checkpoint_key(name)
        if key not in source.tensors:
            continue
        kind = cast(Kind, KINDS[tensor.data_type])
        parts = (VALUES, SCALES, SECOND) if kind == "nvfp4" else (VALUES, SCALES)
        balance = balances.get(name.removesuffix(".weight"))
        fits = balance is None or balance.shape == source.tensors[key].shape[1:]
        if not fits or not all(name + part in external for part in parts):
            yield key
            continue
        base = BY_ONNX[external[name + SCALES].data_type].stored
        weights = LowWeights(source, {key: LowForm(kind, base, exponents.get(key, 0), balance)})
        if not all(_equal(bundle, external[name + part], weights.pieces(key, part)) for part in parts):
            yield key


def _equal(bundle: Bundle, tensor: Any, pieces: Iterator[Any]) -> bool:
    """Whether an initializer's bytes are these."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    path, offset = bundle.file(place["location"]), int(place.get("offset", 0))
    for piece in pieces:
        if not np.array_equal(np.fromfile(path, np.uint8, piece.size, offset=offset), piece.reshape(-1)):
            return False
        offset += piece.size
    return True


def _balances(bundle: Bundle) -> Balances:
    """Site -> f32 [in] that its weight's columns were multiplied by. BundleError if the plan is malformed."""
    path: Path = bundle.file(PLAN)
    try:
        plan = read_object(path, BundleError, MAX_PLAN)["low_bits"]
        vectors = {key: np.exp2(np.asarray(powers, np.float32)) for key, powers in plan["balances"].items()}
        products = plan["products"].items()
        return {site: vectors[product["balance"]] for site, product in products if product.get("balance")}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path}: 'low_bits' is not a plan of low products: export the checkpoint again") from error
