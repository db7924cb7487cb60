"""Eight and four bits in a parity report: what each layer costs, what more bits buy, and the error of each step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from matplotlib.figure import Figure

from .pictures import finished
from .sensitivity import group_of

Found = Mapping[str, Any]
SHOWN = 60  # rows of a table
STORED = {"int8": 1.0, "fp8": 1.0, "nvfp4": 0.5625}  # bytes a weight; of 16 bits 2


def findings(found: Found) -> Found | None:
    """The part of ranges.json about eight and four bits; None if nothing is in them."""
    low = found.get("low_findings")
    return None if low is None else {**low, "plan": found["low_bits"]}


def summary(low: Found) -> str:
    """One sentence on what was decided and on what."""
    kinds = Counter(product["kind"] for product in low["plan"]["products"].values())
    parts = [f"{count} products in {kind}" for kind, count in kinds.items()]
    balanced = sum("balance" in product for product in low["plan"]["products"].values())
    held = "" if low["holds"] else " That is not reached."
    return (
        f"{', '.join(parts)}, {len(low['plan']['kept'])} in 16 bits; {balanced} with balanced channels. Scales and "
        f"choice rest on {low['source']} and all {len(low['steps'])} denoising steps. The actions of each have to be "
        f"within a cosine of {low['budget']:g}, here half as far from 1.{held}"
    )


def layers(low: Found) -> Iterator[tuple[str, ...]]:
    """(layer, kinds, relative error of its products, of the actions if it alone is low, cosine, MB saved)."""
    costs = {cost["group"]: cost for cost in reversed(low["costs"])}  # the first of two is of the asked precision
    products: dict[str, list[str]] = {}
    for site in low["local"]:
        products.setdefault(group_of(site), []).append(site)
    errors = {group: max(max(low["local"][site].values()) for site in sites) for group, sites in products.items()}
    for group in sorted(products, key=lambda g: (-(costs[g]["relative"] if g in costs else 0.0), -errors[g]))[:SHOWN]:
        given = Counter(low["plan"]["products"].get(site, {"kind": "16 bits"})["kind"] for site in products[group])
        cost = costs.get(group)
        measured = ("", "", "")
        if cost is not None:
            saved = cost["weights"] * (2.0 - STORED[cost["kind"]]) / 1e6
            measured = f"{cost['relative']:.1e}", f"{cost['cosine']:.6f}", f"{saved:.2f}"
        yield group, ", ".join(f"{n} {kind}" for kind, n in given.items()), f"{errors[group]:.1e}", *measured


def bought(low: Found) -> Iterator[tuple[str, ...]]:
    """(layers that got more bits so far, their bits, smallest cosine of the actions)."""
    for entry in low["more_bits"]:
        first = f"every layer in {entry['bits']}" if entry["layer"] in ("", "all") else f"and {entry['layer']}"
        yield first, entry["bits"], f"{entry['cosine']:.6f}"


def picture(low: Found) -> bytes:
    """PNG: how far the actions are off after each denoising step, against the budget."""
    figure = Figure(figsize=(7.2, 2.8), layout="constrained")
    axes = figure.add_subplot()
    distances = [max(1.0 - cosine, 1e-9) for cosine in low["steps"]]
    axes.plot(range(1, len(distances) + 1), distances, marker="o", ms=3, label="worst observation")
    axes.axhline(1.0 - low["budget"], color="#b3261e", lw=1.2, label=f"budget: cosine {low['budget']:g}")
    axes.set(xlabel="denoise step", ylabel="1 - cosine of x", yscale="log")
    return finished(figure, axes)
