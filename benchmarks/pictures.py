"""What resizing a picture costs, by method and size, in processor time; all contenders take turns in each round.

    python benchmarks/pictures.py [--rounds N]

`plain` is LeRobot's resizing written down plainly: the whole picture as floats, one axis after the other. `torch` is
what LeRobot itself does, on one thread. Exit status 1 if `torch_pad` is not twice as fast as `plain` for a picture
of 480x640, or differs from torch by more than float32's rounding.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import interpolate, pad

from ki_edge.policy.images import fit_image, inner_size

Array = npt.NDArray[Any]
SIZES = ((480, 640), (720, 1280), (1080, 1920), (240, 320), (224, 224))
SIDE = 224
CAMERA, SPEEDUP = (480, 640), 2.0  # the bar: times as fast as `plain`
ROUNDING = 5e-7


def plain(image: Array) -> Array:
    """Every pixel becomes a float before any is chosen."""
    pixels, sizes = image.astype(np.float32) / np.float32(255), inner_size(*image.shape[:2], SIDE, SIDE)
    for axis, size in ((1, sizes[1]), (0, sizes[0])):
        old = pixels.shape[axis]
        at = np.maximum((np.arange(size, dtype=np.float32) + 0.5) * np.float32(old / size) - np.float32(0.5), 0)
        low = np.minimum(at.astype(np.int64), old - 1)
        share = (at - low).astype(np.float32).reshape((1, -1, 1) if axis else (-1, 1, 1))
        above = np.take(pixels, np.minimum(low + 1, old - 1), axis)
        pixels = np.take(pixels, low, axis) * (1 - share) + above * share
    return centred(pixels * 2 - 1)


def by_torch(image: Array) -> Array:
    """LeRobot's steps: permute, resize, pad with 0, map to [-1, 1]."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    if image.shape[:2] != (SIDE, SIDE):
        inner = inner_size(*image.shape[:2], SIDE, SIDE)
        pixels = interpolate(pixels, inner, mode="bilinear", align_corners=False).clamp(0.0, 1.0)
        down, right = SIDE - inner[0], SIDE - inner[1]
        pixels = pad(pixels, (right // 2, right - right // 2, down // 2, down - down // 2))
    return (pixels * 2.0 - 1.0)[0].permute(1, 2, 0).contiguous().numpy()


def centred(pixels: Array) -> Array:
    """On a margin of -1."""
    canvas = np.full((SIDE, SIDE, 3), -1, np.float32)
    top, left = (SIDE - pixels.shape[0]) // 2, (SIDE - pixels.shape[1]) // 2
    canvas[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return canvas


CONTENDERS: dict[str, Callable[[Array], Array]] = {
    "plain": plain,
    "torch": by_torch,
    "torch_pad": lambda image: fit_image(image, SIDE, SIDE, "torch_pad"),
    "pil_pad": lambda image: fit_image(image, SIDE, SIDE, "pil_pad"),
}


def measure(image: Array, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each contender in each round, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds + 1):
        for name, run in CONTENDERS.items():
            start = time.process_time()
            run(image)
            times[name].append(1e3 * (time.process_time() - start))
    return {name: found[1:] for name, found in times.items()}


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="What resizing a picture costs.")
    parser.add_argument("--rounds", type=int, default=100)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    faster = "torch_pad is faster than plain, torch"
    print(f"| ms, median of a picture | {' | '.join(CONTENDERS)} | {faster} | differs |")
    print("|---|" + "---|" * (len(CONTENDERS) + 2))
    missed = False
    for height, width in SIZES:
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        found = measure(image, rounds)
        ratios = [
            median(a / b for a, b in zip(found[name], found["torch_pad"], strict=True)) for name in ("plain", "torch")
        ]
        differs = float(np.abs(CONTENDERS["torch_pad"](image) - by_torch(image)).max())
        missed |= differs > ROUNDING or ((height, width) == CAMERA and ratios[0] < SPEEDUP)
        cells = [f"{median(times):.2f}" for times in found.values()]
        print(f"| {height}x{width} | {' | '.join(cells)} | {ratios[0]:.1f}x, {ratios[1]:.1f}x | {differs:.1e} |")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
