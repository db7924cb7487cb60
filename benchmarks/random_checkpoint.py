"""Write a random π0.5 checkpoint: every key and width of the real model, as many layers as asked for.

    python benchmarks/random_checkpoint.py OUT --depth 2        (1.1 B parameters, 2.1 GB in bfloat16)
    python benchmarks/random_checkpoint.py OUT --depth 18       (the whole model, 3.6 B parameters, 7.2 GB)
    python benchmarks/random_checkpoint.py OUT --depth 4 --hot 1    (activations of layer 1 leave float16's range)

OUT is a folder in openpi's layout, as its converter writes it: model.safetensors and config.json. Time and memory of a
model depend on its shapes alone, so benchmarks need no trained weights. Values are drawn and written a piece at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from ki_edge.checkpoints.layout.keys import EMBEDDING, EXPERT_HEAD, LM_HEAD, checkpoint_key
from ki_edge.config import PI05, Pi05Config
from ki_edge.dtypes import STORED
from ki_edge.model import Pi05

F32 = npt.NDArray[np.float32]
Shape = tuple[int, ...]
PIECE = 1 << 22  # values drawn at a time
HEAT = {
    "gate_proj": 256.0,
    "up_proj": 256.0,
    "down_proj": 2.0**-16,
}  # of a hot layer's MLP: its product grows 65536-fold
BRANCH_ENDS = ("out_proj.weight", "o_proj.weight", "fc2.weight", "down_proj.weight")  # of residual branches


def geometry(depth: int, vocab: int = PI05.vocab_size) -> Pi05Config:
    """The real model with `depth` Gemma layers, and vision layers in the real proportion (27 to 18)."""
    vision = max(1, round(depth * PI05.vision.depth / PI05.backbone.depth))
    return replace(
        PI05,
        vocab_size=vocab,
        vision=replace(PI05.vision, depth=vision),
        backbone=replace(PI05.backbone, depth=depth),
        expert=replace(PI05.expert, depth=depth),
    )


def stored_shapes(config: Pi05Config) -> dict[str, Shape]:
    """Key -> shape of every tensor in openpi's file: the tied embedding as lm_head, and the expert's unused lm_head."""
    with torch.device("meta"):
        state = Pi05(config).state_dict()
    shapes = {checkpoint_key(name): tuple(tensor.shape) for name, tensor in state.items()}
    shapes[LM_HEAD] = shapes.pop(EMBEDDING)
    shapes[EXPERT_HEAD] = (config.vocab_size, config.expert.width)
    return shapes


def moments(key: str, shape: Shape, depth: int) -> tuple[float, float]:
    """(mean, standard deviation) of a tensor, such that activations stay of order 1 through any number of layers."""
    if len(shape) == 1:
        layer_norm = "vision_tower" in key and "norm" in key and key.endswith("weight")
        return (1.0, 0.1) if layer_norm else (0.0, 0.02)  # Gemma's norms add their own 1
    if "position_embedding" in key:
        return 0.0, 0.3
    if key in (LM_HEAD, EXPERT_HEAD):
        return 0.0, shape[1] ** -0.5  # the model multiplies embeddings by sqrt(width)
    std = math.prod(shape[1:]) ** -0.5
    if key.endswith(BRANCH_ENDS):
        std *= (2 * depth) ** -0.5
    return 0.0, std * (0.3 if ".dense." in key else 1.0)


def heat(key: str, hot: int | None) -> float:
    """Factor of a weight: that of HEAT for the MLP of the backbone's layer `hot`, else 1."""
    found = re.search(r"language_model\.layers\.(\d+)\.mlp\.(\w+)\.weight", key)
    return HEAT[found[2]] if found and hot is not None and int(found[1]) == hot else 1.0


def draw(key: str, shape: Shape, depth: int, rng: np.random.Generator, factor: float = 1.0) -> Iterator[F32]:
    """The tensor's values, flat, in pieces, times `factor`."""
    mean, std = moments(key, shape, depth)
    mean, std = mean * factor, std * factor
    count = math.prod(shape)
    for start in range(0, count, PIECE):
        values = rng.standard_normal(min(PIECE, count - start), np.float32)
        values *= np.float32(std)
        values += np.float32(mean)
        if key.endswith(".dense.bias"):
            values[2 * count // 3 :] += 1.0  # the gate third of a modulation: branches of the expert are open
        yield values


def encode(values: F32, dtype: str) -> bytes:
    """Little-endian bytes; bfloat16 rounds to the nearest, ties to even."""
    if dtype == "F32":
        return values.astype("<f4").tobytes()
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype("<u2").tobytes()


def header(shapes: Mapping[str, Shape], dtype: str) -> bytes:
    """Length and JSON header of a safetensors file with these tensors one behind the other."""
    content: dict[str, object] = {"__metadata__": {EMBEDDING: LM_HEAD, "format": "pt"}}
    end = 0
    for key, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * STORED[dtype].nbytes
        content[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_checkpoint(
    folder: Path,
    *,
    depth: int,
    vocab: int = PI05.vocab_size,
    dtype: str = "BF16",
    seed: int = 0,
    hot: int | None = None,
) -> int:
    """Write the folder; returns the number of parameters. The weights file appears when it is complete.

    `vocab`: rows of the embedding, half of the parameters at a depth of 2. `hot`: a backbone layer whose MLP exceeds
    float16's range, as those of trained language models do.
    """
    config = geometry(depth, vocab)
    shapes = stored_shapes(config)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "model.partial"
    with partial.open("wb") as file:
        file.write(header(shapes, dtype))
        for index, (key, shape) in enumerate(tqdm(shapes.items(), unit="tensor")):
            for values in draw(key, shape, depth, np.random.default_rng([seed, index]), heat(key, hot)):
                file.write(encode(values, dtype))
    settings = {
        "action_dim": config.action_dim,
        "action_horizon": config.action_horizon,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "precision": STORED[dtype].name,
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / "model.safetensors")
    return sum(map(math.prod, shapes.values()))


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description="Write a random π0.5 checkpoint with the real model's widths.")
    parser.add_argument("out", type=Path, metavar="OUT", help="checkpoint folder to write")
    parser.add_argument("--depth", type=int, default=2, help="Gemma layers (%(default)s; the real model has 18)")
    parser.add_argument("--dtype", choices=("BF16", "F32"), default="BF16", help="stored type (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hot", type=int, metavar="LAYER", help="a layer whose activations leave float16's range")
    options = parser.parse_args()
    if options.depth < 1 or options.seed < 0:
        parser.error("--depth must be 1 or more, --seed 0 or more")
    if options.hot is not None and not 0 <= options.hot < options.depth:
        parser.error(f"--hot must be a layer from 0 to {options.depth - 1}")
    depth, dtype, seed = options.depth, options.dtype, options.seed
    count = write_checkpoint(options.out, depth=depth, dtype=dtype, seed=seed, hot=options.hot)
    print(f"{options.out}: {count / 1e9:.3f} B parameters, {count * STORED[options.dtype].nbytes / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
