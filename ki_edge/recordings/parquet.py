"""Rows of a parquet file within a budget of memory.

A file of some kB may stand for gigabytes: a value is stored once and repeated by a count. What it declares is checked
before anything is unpacked, and what it unpacks to while it is read, in portions that suit its size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ki_edge.errors import DatasetError

PORTION = 64 << 20  # bytes that a portion unpacks to, if every row of it holds the largest value there can be
MOST_ROWS = 4096  # of a portion
MOST_VALUES = 100_000_000  # of one column in one row group


def read_portions(path: Path, columns: Sequence[str], most_bytes: int, only: int | None = None) -> Iterator[Any]:
    """Record batches of these columns, in their order. `only`: row groups without this episode are left out.

    DatasetError for a file that needs more than `most_bytes`, or holds a column in a form that hides its size. Errors
    of pyarrow, OSError and KeyError for one that is damaged or lacks a column.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        taken = 0
        for group in range(file.metadata.num_row_groups):
            found = file.metadata.row_group(group)
            facts = [found.column(i) for i in range(found.num_columns)]
            if only is not None and not any(_may_hold(column, only) for column in facts):
                continue
            wanted = [column for column in facts if _is_wanted(column.path_in_schema, columns)]
            _check_declared(path, wanted, most_bytes)
            largest = max((column.total_uncompressed_size for column in wanted), default=1)
            rows = max(1, min(MOST_ROWS, PORTION // max(1, largest)))
            for batch in file.iter_batches(rows, row_groups=[group], columns=list(columns)):
                _check_plain(path, batch)
                taken += batch.nbytes
                if taken > most_bytes:
                    raise DatasetError(f"{path}: unpacks to more than {most_bytes} bytes, at most these are read")
                yield batch


def _is_wanted(place: str, columns: Sequence[str]) -> bool:
    return any(place == name or place.startswith(f"{name}.") for name in columns)


def _check_declared(path: Path, columns: list[Any], most_bytes: int) -> None:
    size = sum(column.total_uncompressed_size for column in columns)
    if size > most_bytes:
        raise DatasetError(f"{path}: {size} bytes in a row group, at most {most_bytes} are read")
    for column in columns:
        if column.num_values > MOST_VALUES:
            raise DatasetError(
                f"{path}: {column.num_values} values of {column.path_in_schema} in a row group, at most {MOST_VALUES} "
                "are read"
            )


def _check_plain(path: Path, batch: Any) -> None:
    """A value that all rows point to weighs nothing here, and its whole size in each of them later."""
    import pyarrow as pa

    for name, kind in zip(batch.schema.names, batch.schema.types, strict=True):
        inner = kind
        while pa.types.is_list(inner) or pa.types.is_large_list(inner) or pa.types.is_fixed_size_list(inner):
            inner = inner.value_type
        if pa.types.is_dictionary(inner) or pa.types.is_run_end_encoded(inner):
            raise DatasetError(f"{path}: {name} is a column of {kind}, expected plain values")


def _may_hold(column: Any, episode: int) -> bool:
    """Whether a column is the episodes' numbers, and this one may be among them."""
    if column.path_in_schema != "episode_index":
        return False
    told = column.statistics
    return told is None or not told.has_min_max or bool(told.min <= episode <= told.max)
