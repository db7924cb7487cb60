"""The parquet tables of a dataset, and files that get their names when they are complete."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ki_edge.recordings import lerobot_layout as layout

from .features import Features
from .statistics import Stats

OUTCOME = {
    "ki.seed": "int64", "ki.success": "bool", "ki.success_any": "bool", "ki.reached": "int64", "ki.inferences": "int64",
    "ki.seconds": "float64", "ki.stopped": "bool", "ki.dropped": "int64",
}  # fmt: skip


def schema(features: Features) -> Any:
    import pyarrow as pa

    types = {"float32": pa.float32(), "int64": pa.int64(), "bool": pa.bool_()}
    numbers = [
        (name, types[dtype] if shape == (1,) else pa.list_(types[dtype], shape[0]))
        for name, (dtype, shape, _) in features.columns().items()
    ]
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.schema([*numbers, *((key, picture) for key in features.image_keys)])


def task_table(tasks: Mapping[str, int]) -> Any:
    """The instructions, as pandas writes a frame whose index they are: that is how LeRobot reads them."""
    import pyarrow as pa

    kinds = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [
            {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
            for name, (kind, numpy) in kinds.items()
        ],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.0.0",
    }
    table = pa.table({"task_index": pa.array(list(tasks.values()), pa.int64()), "task": pa.array(tasks, pa.string())})
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def episode_table(
    features: Features,
    index: int,
    frames: tuple[int, int],
    stats: Mapping[str, Stats],
    outcome: Mapping[str, Any],
    tasks: list[str],
) -> Any:
    """One row: where an episode's frames are (of the whole dataset from, to), how it went (OUTCOME), its statistics."""
    import pyarrow as pa

    place, count = layout.place(index), frames[1] - frames[0]
    numbers: dict[str, Any] = {"episode_index": index, "length": count}
    numbers |= {f"data/{name}": value for name, value in place.items()}
    numbers |= {"dataset_from_index": frames[0], "dataset_to_index": frames[1]}
    for key in features.video_keys:
        numbers |= {f"videos/{key}/{name}": value for name, value in place.items()}
        numbers |= {f"videos/{key}/from_timestamp": 0.0, f"videos/{key}/to_timestamp": count / features.fps}
    numbers |= {f"meta/episodes/{name}": value for name, value in place.items()}
    row = {
        name: pa.array([value], pa.float64() if isinstance(value, float) else pa.int64())
        for name, value in numbers.items()
    }
    kinds = {"int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_()}
    row |= {name: pa.array([outcome.get(name)], kinds[kind]) for name, kind in OUTCOME.items()}
    row["tasks"] = pa.array([tasks], pa.list_(pa.string()))
    for feature, values in stats.items():
        for name, value in values.items():
            row[f"stats/{feature}/{name}"] = pa.array([value.tolist()])
    return pa.table(row)


def write_table(path: Path, table: Any) -> None:
    """A parquet file, whole or not at all."""
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = hidden(path)
    try:
        pq.write_table(table, partial)
        sync(partial)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def hidden(path: Path) -> Path:
    """The name of a file that is not complete; no reader looks for such names."""
    return path.with_name(f".{path.name}.partial")


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
