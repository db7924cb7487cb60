"""The range audit in a parity report: its table, and a picture of the headroom by layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ki_edge.errors import BundleError
from ki_edge.files.reading import read_object

from . import low_report
from .pictures import finished
from .ranges import KINDS, LARGEST, MARGIN, RANGES, scaling

LAYER = re.compile(r"(vision|backbone|expert)\b.*\blayers\.(\d{1,4})\.")
SHOWN = 40  # rows of the table: those with the least headroom
Found = Mapping[str, Any]


def read_ranges(bundle: Path) -> Found | None:
    """ranges.json of a bundle's folder; None for a bundle that has none. BundleError if it is damaged."""
    path = bundle / RANGES
    if not path.is_file():
        return None
    try:
        found = read_object(path, BundleError)
        _check(found)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        why = " ".join(str(error).split())[:200]
        raise BundleError(f"{path} is not what an export writes ({why}): export the checkpoint again") from None
    return dict(found)


def _check(found: Found) -> None:
    """That the report can be made."""
    if "ranges" in found:
        list(rows(found))
        picture(found)
        summary(found)
    list(costs(found))
    if (low := low_report.findings(found)) is not None:
        list(low_report.layers(low))
        list(low_report.bought(low))
        low_report.summary(low)
        low_report.picture(low)


def summary(found: Found) -> str:
    """One sentence on what was measured."""
    kept, scaled = len(found["float32"]), len({*found["exponents"], *found["factors"]})
    return (
        f"Largest values of {len(found['ranges'])} matrix products in float32, over {found['source']}. float16 ends at "
        f"{LARGEST:.0f}; what comes within {MARGIN:.0f}x of it is scaled ({scaled} products) or stays float32 ({kept})."
    )


def rows(found: Found) -> Iterator[tuple[str, ...]]:
    """(product, graph, operand, result, weight, headroom, what was done) of those with the least headroom."""
    for entry in sorted(found["ranges"], key=lambda entry: entry["headroom"])[:SHOWN]:
        operand = max(entry[kind]["largest"] for kind in ("input", "other") if kind in entry)
        sizes = [f"{operand:.3g}"]
        sizes += [f"{entry[kind]['largest']:.3g}" if kind in entry else "" for kind in ("output", "weight")]
        yield entry["site"], entry["graph"], *sizes, f"{entry['headroom']:.3g}x", _done(found, entry["site"])


def costs(found: Found) -> Iterator[tuple[str, ...]]:
    """(layer, error, relative, megabytes) of the sensitivity, the largest error first."""
    for cost in found.get("sensitivity", ()):
        yield cost["group"], f"{cost['error']:.1e}", f"{cost['relative']:.1e}", f"{cost['megabytes']:.1f}"


def _done(found: Found, site: str) -> str:
    if site in found["float32"]:
        return f"float32: {found['float32'][site]}"
    return scaling(found["exponents"].get(site, 0), found["factors"].get(site, 0))


def picture(found: Found) -> bytes:
    """PNG: the largest value of each layer's products, against float16's end and the margin."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for part, layers in _by_layer(found).items():
        axes.plot(list(layers), list(layers.values()), marker="o", ms=3, label=part)
    axes.axhline(LARGEST, color="#b3261e", lw=1.2, label=f"float16 ends: {LARGEST:.0f}")
    axes.axhline(LARGEST / MARGIN, color="#b3261e", lw=1, ls="--", label=f"margin: a {MARGIN:.0f}th of it")
    axes.set(xlabel="layer", ylabel="largest value of its products", yscale="log")
    return finished(figure, axes)


def _by_layer(found: Found) -> dict[str, dict[int, float]]:
    """Part of the model -> layer -> largest value, the MLP's product apart from all else."""
    series: dict[str, dict[int, float]] = {}
    for entry in found["ranges"]:
        match = LAYER.match(entry["site"])
        if match is None:
            continue
        sizes = {kind: entry[kind]["largest"] for kind in KINDS if kind in entry}
        product = entry["site"].endswith("mlp.down_proj")
        groups = {match[1]: max(value for kind, value in sizes.items() if not (product and kind == "input"))}
        if product:
            groups[f"{match[1]}: MLP product"] = sizes["input"]
        for name, value in groups.items():
            layers = series.setdefault(name, {})
            layers[int(match[2])] = max(layers.get(int(match[2]), 0.0), value)
    return {name: dict(sorted(layers.items())) for name, layers in series.items()}
