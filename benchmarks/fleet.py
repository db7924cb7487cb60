"""How many GPUs, and how much network, for 10, 1,000 or 100,000 robots: the queue as a simulation.

    python benchmarks/fleet.py                                 the tables of docs/serving_fleet.md
    python benchmarks/fleet.py --bundle BUNDLE                 also for this bundle, as this machine runs it
    python benchmarks/fleet.py --plot docs/images/fleet.png    the picture of that page

Nothing here was measured on a GPU: a card's service times are counted (`benchmarks/boards.py --floor` of
`benchmarks/gpu.py`) over an assumed share of the limit that is reached, or published by others.
"""

from __future__ import annotations

import argparse
import io
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from boards import markdown
from front import front_ms
from queueing import least_servers, percentile, periodic, poisson, simulate, varying

from ki_edge.config import PI05
from ki_export.source.devices import DEVICES, floor_ms, stages

REACHED = 0.73  # of the limit: others' 29.2 ms of an RTX 4090 with two cameras, where 21.4 are counted
STEPS, CAMERAS, PROMPT = 10, 2, 30
SOME = 0.05  # standard deviation of a GPU's service time over its mean
MOST_USED = 0.9  # of the GPUs' time: the rest is for machines that are down or change their bundle
GOAL, NETWORK = 0.100, 0.010  # seconds: p99 of an answer, and of it the way there and back
PERIOD = 8 / 15  # DROID: 15 actions a second, eight of a chunk are executed
JITTER = 0.010
FEW, DRAWS = 200, 40  # robots below which, and draws of which
BATCHES = (1, 2, 4, 8)
SIDE, PICTURES = 224, 2


@dataclass(frozen=True)
class Engine:
    """`of_batch[b]`: mean seconds of a batch of b; `variation`: of one, standard deviation over mean."""

    name: str
    of_batch: dict[int, float]
    variation: float = SOME

    def service(self, seed: int) -> Callable[[int], float]:
        largest = max(self.of_batch)
        one = varying(1.0, self.variation, seed)
        means = [0.0, *(np.interp(b, [*self.of_batch], [*self.of_batch.values()]) for b in range(1, largest + 1))]
        return lambda batch: means[batch] * one(1)


def counted(name: str, reached: float = REACHED) -> Engine:
    """A card by its limit: products grow with the batch, weights are read once for all of it."""
    device = next(device for device in DEVICES if device.name == name)

    def seconds(batch: int) -> float:
        found = 0.0
        for stage in stages(PI05, cameras=CAMERAS, prompt=PROMPT, steps=STEPS):
            more = type(stage)(stage.name, stage.weights, batch * stage.operations, stage.runs)
            found += floor_ms(more, device, 2)
        return found / 1e3 / reached

    return Engine(f"{name}, counted", {batch: seconds(batch) for batch in BATCHES})


def measured(bundle: Path, seconds: float = 10.0) -> Engine:
    """A bundle on one thread of this machine."""
    from ki_runtime import Policy

    policy = Policy.load(bundle, threads=1)
    policy.warm_up()
    contract, random = policy.contract, np.random.default_rng(0)
    pictures = {c.key: random.integers(0, 256, (*contract.image_size, 3), np.uint8) for c in contract.cameras if c.key}
    state = policy.stats["state"].mean if "state" in policy.stats else np.zeros(contract.state_dim)
    observation = {"images": pictures, "state": np.asarray(state)[: contract.state_dim], "prompt": "pick it up"}
    took, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        policy.infer(observation, seed=0)
        took.append(time.perf_counter() - start)
    return Engine(
        f"{bundle.name}, one CPU thread, measured", {1: float(np.mean(took))}, float(np.std(took) / np.mean(took))
    )


def arrivals(robots: int, requests: int, kind: str, seed: int = 1) -> np.ndarray:
    if kind == "poisson":
        return poisson(robots / PERIOD, requests, seed)
    cycles = max(4, requests // robots)
    return np.sort(periodic(robots, PERIOD, JITTER, cycles, seed, kind == "together").ravel())


def p99(engine: Engine, robots: int, servers: int, requests: int, kind: str, largest: int = 1) -> float:
    """Seconds, with the network. Of few regular robots luck decides: what nine of ten draws of beginnings keep."""
    draws = DRAWS if kind == "periodic" and robots < FEW else 1
    found = []
    for seed in range(1, draws + 1):
        times = arrivals(robots, max(requests // draws, 2 * robots), kind, seed)
        found.append(percentile(simulate(times, engine.service(2), servers, largest), 99))
    return NETWORK + float(np.percentile(found, 90))


def needed(engine: Engine, robots: int, requests: int, kind: str = "poisson", largest: int = 1) -> int | None:
    """The fewest GPUs for the goal; None where one answer alone takes longer."""
    if not _in_time(engine):
        return None
    load = robots / PERIOD * engine.of_batch[largest] / largest / MOST_USED
    return least_servers(
        lambda servers: p99(engine, robots, servers, requests, kind, largest) <= GOAL, max(1, math.ceil(load - 0.01))
    )


def _in_time(engine: Engine) -> bool:
    return NETWORK + engine.of_batch[1] * (1 + 2.5 * engine.variation) < GOAL


def gpu_rows(engines: list[Engine], robots: list[int], requests: int) -> list[list[str]]:
    """By fleet and engine: GPUs in one queue, in cells of eight, and what periodic robots need."""
    rows = []
    cells_of = {engine.name: robots_of_cell(engine, requests) for engine in engines if _in_time(engine)}
    for count in robots:
        for engine in engines:
            row = [f"{count:,}", engine.name, f"{1e3 * engine.of_batch[1]:.1f}"]
            found = needed(engine, count, requests)
            if found is None:
                rows.append([*row, *["too slow"] * 4])
                continue
            use = count / PERIOD * engine.of_batch[1] / found
            cells = f"{-(-count // cells_of[engine.name]) * 8:,}" if count > cells_of[engine.name] else ""
            regular = needed(engine, count, requests, "periodic")
            rows.append([*row, f"{found:,}", f"{100 * use:.0f} %", f"{regular:,}", cells])
    return rows


def robots_of_cell(engine: Engine, requests: int, servers: int = 8) -> int:
    """The most robots that eight GPUs in a machine answer in time."""
    most = int(MOST_USED * servers * PERIOD / engine.of_batch[1])
    too_many = least_servers(
        lambda spare: p99(engine, most - spare, servers, requests, "poisson") <= GOAL, 0
    )  # fewer than the most that could ever be
    return most - too_many


def batch_rows(engines: Iterable[Engine]) -> list[list[str]]:
    """What a batch takes, and how many answers a second that gives."""
    return [
        [engine.name, *(f"{1e3 * s:.0f} ms, {b / s:.0f}/s" for b, s in engine.of_batch.items())]
        for engine in engines
        if len(engine.of_batch) > 1
    ]


def jpeg_bytes(quality: int) -> int:
    """Of a photograph at the model's size: a portrait that comes with matplotlib."""
    import matplotlib.cbook
    from PIL import Image

    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        picture = Image.open(file).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality)
    return len(out.getvalue())


def frame_bytes(picture: int) -> int:
    """A request: its pictures, and about 400 bytes of state, sentence and names."""
    return PICTURES * picture + 400


def phase_lines(engine: Engine, robots: int, draws: int = 100, cycles: int = 300) -> list[str]:
    """Regular robots keep the moments at which they once began: what p99 is by luck, and for the unluckiest of them."""
    found, unlucky = [], []
    for seed in range(draws):
        times = periodic(robots, PERIOD, JITTER, cycles, seed)
        order = np.argsort(times.ravel(), kind="stable")
        took = np.empty(times.size)
        took[order] = simulate(times.ravel()[order], engine.service(2), 1)
        found.append(NETWORK + percentile(took[order], 99))
        unlucky.append(NETWORK + np.median(took.reshape(times.shape), axis=0).max())
    spread = ", ".join(f"{1e3 * np.percentile(found, share):.0f}" for share in (10, 50, 90, 100))
    return [
        f"{robots} regular robots on one {engine.name}, {draws} draws of their beginnings: p99 {spread} ms in 10, 50, "
        f"90, 100 % of them; in time in {100 * np.mean(np.array(found) <= GOAL):.0f} %; the unluckiest robot's median "
        f"{1e3 * np.median(unlucky):.0f} ms, at most {1e3 * max(unlucky):.0f} ms"
    ]


def network_rows(robots: list[int]) -> list[list[str]]:
    raw = SIDE * SIDE * 3
    kinds = {"raw": raw, **{f"JPEG {quality}": jpeg_bytes(quality) for quality in (95, 85)}}
    rows = []
    for name, size in kinds.items():
        per_second = frame_bytes(size) / PERIOD
        rates = [f"{8 * count * per_second / 1e6:,.1f}" for count in robots]
        rows.append([f"{name}, {PICTURES} pictures", f"{frame_bytes(size) / 1e3:.1f}", *rates])
    return rows


def plot(engine: Engine, path: Path, requests: int) -> None:
    """p99 over the share of the GPUs' time in use, for queues of several sizes, and for regular robots."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.2), dpi=110)
    shares = np.concatenate([np.arange(0.2, 0.9, 0.1), [0.9, 0.94, 0.97]])
    for servers, colour in zip((1, 8, 64, 512), ("C0", "C1", "C2", "C3"), strict=True):
        for kind, line in (("poisson", "-"), ("periodic", "--")):
            ask = [max(1, round(share * servers * PERIOD / engine.of_batch[1])) for share in shares]
            found = [1e3 * p99(engine, robots, servers, requests, kind) for robots in ask]
            used = [100 * robots / PERIOD * engine.of_batch[1] / servers for robots in ask]
            label = f"{servers} GPU{'s' if servers > 1 else ''}, {'at random' if kind == 'poisson' else 'regular'}"
            axes.plot(used, found, line, color=colour, label=label, marker=".", markersize=4)
    axes.axhline(1e3 * GOAL, color="0.4", linewidth=0.8)
    axes.set(
        xlabel="GPU time in use, %", ylabel="p99 of an answer, ms", ylim=(0, 300), xlim=(15, 100), title=engine.name
    )
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="measure this bundle here too")
    parser.add_argument("--robots", default="10,1000,100000")
    parser.add_argument("--requests", type=int, default=100_000, help="of a simulation; at least two a robot")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    given = parser.parse_args()
    robots = [int(word) for word in given.robots.split(",")]
    cards = [counted("RTX 4090"), counted("RTX 5090"), counted("H200")]
    engines = [*cards, Engine("H200, published by others", {1: 0.0294})]
    if given.bundle is not None:
        engines.append(measured(given.bundle))
    if given.plot is not None:
        plot(cards[0], given.plot, given.requests)
    head = ["robots", "engine", "ms", "GPUs", "in use", "GPUs, regular robots", "GPUs in cells of 8"]
    print("\n".join(markdown(head, gpu_rows(engines, robots, given.requests))), end="\n\n")
    print("\n".join(markdown(["batch of", *map(str, BATCHES)], batch_rows(cards))), end="\n\n")
    head = ["", "kB a request", *(f"Mbit/s, {count:,} robots" for count in robots)]
    print("\n".join(markdown(head, network_rows(robots))), end="\n\n")
    for kind in ("poisson", "together"):
        times = "  ".join(f"{1e3 * p99(cards[0], 10, n, given.requests, kind):.0f}" for n in (1, 2))
        print(f"10 robots, {kind}: p99 {times} ms with 1 and 2 of {cards[0].name}")
    print("\n".join(phase_lines(cards[0], 10)))
    print(f"ki-serve's own work on a request with raw pictures: {front_ms():.2f} ms of a core here")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
