"""The dashboard's panels as one picture, from what a Prometheus has: for a look without Grafana, or for a report.

python examples/grafana/draw.py http://localhost:9090 build/dashboard.png --minutes 30
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

BOARD = Path(__file__).with_name("ki-serve.json")
STEPS, COLUMNS = 240, 3
SCALES = {"s": (1e3, "ms"), "bytes": (1e-6, "MB"), "Bps": (1e-6, "MB/s"), "reqps": (1.0, "a second")}
Curve = tuple[str, list[float], list[float]]  # its name, minutes before now, values


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw the panels of ki-serve.json from a Prometheus.")
    parser.add_argument("address", help="of Prometheus, http://localhost:9090")
    parser.add_argument("picture", type=Path, help="file to write, .png or .svg")
    parser.add_argument("--minutes", type=float, default=30.0, help="so far back; default: %(default)g")
    parser.add_argument("--instance", default=".*", help="servers, as a regular expression; default: all")
    options = parser.parse_args()
    panels = [panel for panel in json.loads(BOARD.read_text())["panels"] if panel["type"] == "timeseries"]
    try:
        found = [(panel, curves(options, panel)) for panel in panels]
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"draw.py: error: {options.address}: {error}", file=sys.stderr)
        return 2
    draw(found, options.picture, options.minutes)
    print(f"{options.picture}: {len(panels)} panels, {sum(len(curves) for _, curves in found)} curves")
    return 0


def curves(options: argparse.Namespace, panel: Mapping[str, Any]) -> list[Curve]:
    """Of all queries of a panel. OSError, ValueError, KeyError, TypeError where no Prometheus answers."""
    now, found = time.time(), []
    step = max(1.0, 60 * options.minutes / STEPS)
    for target in panel["targets"]:
        query = target["expr"].replace("$instance", options.instance).replace("$__rate_interval", f"{4 * step:.0f}s")
        asked = {"query": query, "start": now - 60 * options.minutes, "end": now, "step": step}
        with urlopen(f"{options.address.rstrip('/')}/api/v1/query_range?{urlencode(asked)}", timeout=30) as reply:
            result = json.load(reply)["data"]["result"]
        for series in result:
            name = target.get("legendFormat", "")
            for label, value in series["metric"].items():
                name = name.replace("{{" + label + "}}", value)
            points = [(float(at), float(value)) for at, value in series["values"]]
            found.append((name, [(at - now) / 60 for at, _ in points], [value for _, value in points]))
    return found


def draw(panels: Sequence[tuple[Mapping[str, Any], list[Curve]]], picture: Path, minutes: float) -> None:
    from matplotlib.figure import Figure

    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(4.6 * COLUMNS, 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for place, (panel, found) in zip(axes, panels, strict=False):
        scale, unit = SCALES.get(panel["fieldConfig"]["defaults"]["unit"], (1.0, ""))
        for name, at, values in found:
            if any(value == value and value for value in values):  # nothing of a kind that never came
                place.plot(at, [scale * value for value in values], linewidth=1.2, label=name)
        place.set_title(panel["title"] + (f", {unit}" if unit else ""), fontsize=9, loc="left")
        place.set_xlim(-minutes, 0)
        place.set_ylim(0, 1.3 * max(place.get_ylim()[1], 1e-9) if place.lines else 1)
        place.tick_params(labelsize=7)
        place.grid(alpha=0.25)
        place.spines[["top", "right"]].set_visible(False)
        if place.lines:
            place.legend(fontsize=6.5, frameon=False, loc="upper left", ncols=3)
        else:
            place.text(-minutes / 2, 0.5, "none", fontsize=8, ha="center", color="grey")
    for place in axes[len(panels) :]:
        place.set_axis_off()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=100)


if __name__ == "__main__":
    sys.exit(main())
