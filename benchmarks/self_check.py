"""Whether the disagreement of a policy's two heads tells what it was never trained for from what it was.

    python benchmarks/self_check.py build/demo/bundle --scenes 200 --seed 2000 -o build/self_check

Scenes of the simulated arm on its way to the target; each is shown as it is, and spoilt in the ways of SPOILT. Writes
self_check.json, self_check.md (areas under the ROC curves, what the limit of --self-check-save would have caught, how
far the policy's own aim was off, costs) and self_check.png. The same seeds give the same numbers, but for the times.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ki_edge.errors import KiEdgeError
from ki_runtime.control.self_check_file import limit_of
from ki_runtime.policy.agreement import Agreement
from ki_runtime.policy.policy import Policy
from ki_runtime.robots.fetch import CAMERAS, FetchScene

Scene = dict[str, Any]
LEFT, RIGHT = (camera.name for camera in CAMERAS)
PROMPT = "reach the red target"
COLOURS = ("#b2182b", "#d6604d", "#f4a582", "#2166ac", "#67a9cf", "#8a8a8a", "#4d9221")


def _cameras(change: Callable[[dict[str, Any], Scene, Any], dict[str, Any]]) -> Callable[[Scene, Scene, Any], Scene]:
    return lambda scene, old, rng: {**scene, "images": {**scene["images"], **change(scene["images"], old, rng)}}


def _noisy(pixels: Any, rng: Any) -> Any:
    return np.clip(pixels + rng.normal(0.0, 40.0, pixels.shape), 0, 255).astype(np.uint8)


SPOILT: dict[str, Callable[[Scene, Scene, Any], Scene]] = {
    "both cameras covered": _cameras(lambda images, old, rng: {name: np.zeros_like(images[name]) for name in images}),
    "one camera covered": _cameras(lambda images, old, rng: {LEFT: np.zeros_like(images[LEFT])}),
    "cameras swapped": _cameras(lambda images, old, rng: {LEFT: images[RIGHT], RIGHT: images[LEFT]}),
    "one camera frozen": _cameras(lambda images, old, rng: {LEFT: old["images"][LEFT]}),
    "noise": _cameras(lambda images, old, rng: {name: _noisy(pixels, rng) for name, pixels in images.items()}),
    "another prompt": lambda scene, old, rng: {**scene, "prompt": "open the drawer"},
    "another state": lambda scene, old, rng: {**scene, "state": old["state"]},
}


def scenes(count: int, seed: int) -> list[tuple[Scene, Any]]:
    """Observations on the way to targets, each with where its target is [3]."""
    arm, found = FetchScene(), []
    rng = np.random.default_rng(seed)
    for index in range(count):
        arm.reset(seed + index)
        for _ in range(rng.integers(0, 6)):
            arm.step(arm.plan(1)[0])
        found.append(({"images": arm.pictures(), "state": arm.state, "prompt": PROMPT}, arm.target))
    arm.close()
    return found


def auc(normal: Any, spoilt: Any) -> float:
    """The chance that a spoilt observation scores above a normal one."""
    above, same = spoilt[:, None] > normal[None], spoilt[:, None] == normal[None]
    return float(np.mean(above + 0.5 * same))


def measure(policy: Policy, shown: list[tuple[Scene, Any]], label: str, seed: int) -> dict[str, Any]:
    """Disagreement, error of the flow's aim (m) and milliseconds of both heads, one of each a scene."""
    agreement = Agreement(policy.stats, policy.contract.action_dim)
    apart, off, took = [], [], []
    for index, (scene, target) in enumerate(tqdm(shown, desc=label, leave=False, disable=None)):
        start = time.perf_counter()
        flow = policy.infer(scene, seed=seed + index)["actions"]
        middle = time.perf_counter()
        fast = policy.infer_fast(scene)["actions"]
        took.append((1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)))
        apart.append(float("inf") if fast is None else agreement.disagreement(flow, fast))
        off.append(float(np.linalg.norm(flow[-1, :3] - target)))
    return {"apart": np.array(apart), "off": np.array(off), "ms": np.median(np.array(took), axis=0)}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| what the policy sees | area under ROC | beyond the limit | median disagreement | aim off by (median) |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        area = "" if row["auc"] is None else f"{row['auc']:.2f}"
        cells = [row["name"], area, f"{100 * row['beyond']:.0f} %", f"{row['apart']:.3f}", f"{1e3 * row['off']:.0f} mm"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(path: Path, normal: Any, spoilt: dict[str, Any]) -> None:
    """ROC curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 4.4), layout="constrained")
    axes = figure.subplots()
    for (name, scores), colour in zip(spoilt.items(), COLOURS, strict=True):
        limits = np.concatenate([[np.inf], np.sort(np.concatenate([normal, scores]))[::-1], [-np.inf]])
        false, true = ((values[None] > limits[:, None]).mean(axis=1) for values in (normal, scores))
        axes.plot(false, true, color=colour, label=f"{name}: {auc(normal, scores):.2f}")
    axes.plot([0, 1], [0, 1], color="#e4e4e4", zorder=0)
    axes.set_xlabel("normal observations beyond the limit")
    axes.set_ylabel("spoilt observations beyond the limit")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)


def main() -> int:
    """Measure; exit status 2 for a bundle that cannot be used."""
    parser = argparse.ArgumentParser(description="ROC curves of the self-check on the simulated arm.")
    parser.add_argument("bundle", help="bundle of a policy for gym:FetchReach-v4, with its FAST head")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=2000)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/self_check"))
    given = parser.parse_args()
    try:
        policy = Policy.load(given.bundle, "ort", threads=1, say=lambda _: None)
        policy.warm_up(fast=True)
        usual = limit_of(measure(policy, scenes(given.scenes, given.seed + 10**6), "limit", given.seed)["apart"])
    except KiEdgeError as error:
        print(f"self_check: error: {error}", file=sys.stderr)
        return 2
    limit, shown, rng = usual["limit"], scenes(given.scenes, given.seed), np.random.default_rng(given.seed)
    found = {"as it is": measure(policy, shown, "as it is", given.seed)}
    for name, spoil in SPOILT.items():
        old = [shown[(at + len(shown) // 2) % len(shown)][0] for at in range(len(shown))]
        spoilt = [(spoil(scene, before, rng), target) for (scene, target), before in zip(shown, old, strict=True)]
        found[name] = measure(policy, spoilt, name, given.seed)
    normal = found["as it is"]["apart"]
    rows = [
        {
            "name": name,
            "auc": None if name == "as it is" else auc(normal, one["apart"]),
            "beyond": float((one["apart"] > limit).mean()),
            "apart": float(np.median(one["apart"])),
            "off": float(np.median(one["off"])),
        }
        for name, one in found.items()
    ]
    flow, fast = found["as it is"]["ms"]
    given.output.mkdir(parents=True, exist_ok=True)
    facts = {"scenes": given.scenes, "seed": given.seed, "usual": usual, "ms": {"flow": flow, "fast": fast}}
    (given.output / "self_check.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    (given.output / "self_check.md").write_text(table(rows) + "\n")
    plot(given.output / "self_check.png", normal, {name: one["apart"] for name, one in found.items() if name in SPOILT})
    print(table(rows))
    print(f"limit {limit:.3f}; an inference {flow:.0f} ms, a check {fast:.0f} ms (medians, one thread)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
