"""LeRobot before 0.4: normalisation as buffers among the weights, instead of processors beside them.

normalize_inputs.buffer_observation_state.<statistic>, unnormalize_outputs.buffer_action.<statistic>, and
normalize_targets, which only training uses. A buffer that was never set holds infinity.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ki_edge.checkpoints.layout.formats import SHARDS, WEIGHTS
from ki_edge.errors import CheckpointError
from ki_edge.files.safetensors_index import SafetensorsIndex
from ki_edge.policy.normalize import NormStats, checked_stats

from .lerobot_config import CONFIG, Notes
from .lerobot_options import is_text_map
from .lerobot_processors import FIELDS, MODES
from .statistics import Statistics

BUFFER = re.compile(r"(?:model\.)?(normalize_inputs|unnormalize_outputs)\.buffer_(observation_state|action)\.(\w+)")
# contract's feature -> where LeRobot kept what it applies at run time, and the kind in normalization_mapping
PLACES = {
    "state": ("normalize_inputs", "observation_state", "STATE"),
    "actions": ("unnormalize_outputs", "action", "ACTION"),
}
Buffers = dict[tuple[str, str], dict[str, np.ndarray[Any, np.dtype[np.float64]]]]


def read_buffers(folder: Path) -> Buffers:
    """{(module, feature): {statistic: float64 [d]}}; empty for a checkpoint of today."""
    found: Buffers = {}
    files = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else []
    if not files and (folder / SHARDS).is_file():
        files = sorted(folder.glob("*.safetensors"))
    for file in files:
        index = SafetensorsIndex(file)
        for name in index.entries:
            match = BUFFER.fullmatch(name)
            if match is not None:
                module, feature, statistic = match.groups()
                found.setdefault((module, feature), {})[statistic] = index.array(name).astype(np.float64).reshape(-1)
    return found


def read_old_statistics(
    folder: Path, settings: Mapping[str, Any], buffers: Buffers, wanted: bool, notes: Notes
) -> Statistics | None:
    """Kinds of normalisation from config.json, statistics from the buffers if they are `wanted`.

    What the buffers lack is added to what is missing. CheckpointError for a mapping that is not known.
    """
    mapping = settings.get("normalization_mapping")
    if not isinstance(mapping, dict) or not is_text_map(mapping):
        raise CheckpointError(
            f"{folder / CONFIG}: normalization_mapping is {mapping!r:.100}, expected an object such as "
            '{"STATE": "MEAN_STD", "ACTION": "MEAN_STD"}'
        )
    features: dict[str, NormStats] = {}
    for name, (module, feature, kind) in PLACES.items():
        mode = mapping.get(kind, "")
        if mode not in MODES:
            raise CheckpointError(
                f"{folder / CONFIG}: normalization_mapping: {kind} is {mode!r:.60}, expected one of {', '.join(MODES)}"
            )
        normalization, statistics = MODES[mode]
        notes.add(CONFIG, **{"normalization" if name == "state" else "action_normalization": normalization})
        given = buffers.get((module, feature), {})
        problem = _problem(statistics, given)
        if statistics and wanted and problem:
            notes.missing.append(
                f"no statistics of '{name}' for {mode}: in {WEIGHTS}, where LeRobot before 0.4 kept them, "
                f"{module}.buffer_{feature} {problem} (give --norm-stats, statistics with {' and '.join(statistics)})"
            )
        elif statistics and wanted:
            names = dict(zip(FIELDS[normalization], statistics, strict=True))
            found = {field: given[one] for field, one in names.items()}
            features[name] = checked_stats(
                found, f"{folder / WEIGHTS}: {module}.buffer_{feature}", names, CheckpointError
            )
    if not features:
        return None
    content = b"".join(value.tobytes() for entry in buffers.values() for _, value in sorted(entry.items()))
    return Statistics(features, f"{WEIGHTS}, buffers of LeRobot before 0.4", hashlib.sha256(content).hexdigest())


def _problem(statistics: tuple[str, ...], given: Mapping[str, Any]) -> str:
    """Why buffers cannot be used; "" if they can."""
    absent = [one for one in statistics if one not in given]
    if absent:
        return f"has {', '.join(sorted(given)) or 'nothing'}, not {' and '.join(absent)}"
    unset = [one for one in statistics if np.isinf(given[one]).any()]
    return f"was never set: its {unset[0]} is infinite" if unset else ""
