"""A model's recorded inputs and outputs: arrays in an .npz file, see `ki_export.parity.recorded` for their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.config import Pi05Config
from ki_edge.errors import DatasetError
from ki_edge.files.npz import read_npz
from ki_edge.policy.images import model_pictures

Array = npt.NDArray[Any]
MAX_BYTES = 4 << 30  # of all arrays of a file
PROMPTS = (("prompt_only_tokens", "prompt_only_mask"), ("tokenized_prompt", "tokenized_prompt_mask"))


def read_arrays(path: Path, cure: str = "") -> dict[str, Array]:
    """All arrays of an .npz file; DatasetError, which ends with `cure`, if it is missing or no such file."""
    return read_npz(path, MAX_BYTES, DatasetError, cure=cure)


def recorded_pictures(images: Array, config: Pi05Config) -> Array:
    """Pictures of a recording as the model takes them: bytes are mapped, floats stay."""
    return model_pictures(images, config.pictures) if images.dtype == np.uint8 else images
