"""A small parquet file may stand for gigabytes: it is read within a budget."""

import re
from pathlib import Path

import pytest

from ki_edge.errors import DatasetError
from ki_edge.recordings import parquet

pa = pytest.importorskip("pyarrow", reason="pip install 'ki-edge[record]'")
pq = pytest.importorskip("pyarrow.parquet", reason="pip install 'ki-edge[record]'")
LONG = 100_000


def write(path: Path, rows: int, *, schema: bool = False) -> Path:
    """`rows` texts of LONG characters, of which the file holds one."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), ["x" * LONG])
    pq.write_table(pa.table({"task": texts, "n": range(rows)}), path, store_schema=schema, compression="zstd")
    return path


def test_what_unpacks_to_more_than_the_budget_is_refused_on_the_way(tmp_path):
    path = write(tmp_path / "bomb.parquet", 20_000)
    assert path.stat().st_size < LONG
    seen = 0
    with pytest.raises(DatasetError, match="unpacks to more than 256000000 bytes"):
        for batch in parquet.read_portions(path, ["task"], 256_000_000):
            assert batch.nbytes <= 1.1 * parquet.PORTION
            seen += batch.nbytes
    assert 100_000_000 < seen <= 256_000_000


def test_a_column_that_is_not_asked_for_costs_nothing(tmp_path):
    path = write(tmp_path / "bomb.parquet", 20_000)
    numbers = [n for batch in parquet.read_portions(path, ["n"], 1_000_000) for n in batch["n"].to_pylist()]
    assert numbers == list(range(20_000))


def test_a_column_whose_rows_share_their_value_is_refused(tmp_path):
    path = write(tmp_path / "shared.parquet", 10, schema=True)
    with pytest.raises(DatasetError, match=re.escape("task is a column of dictionary<")):
        list(parquet.read_portions(path, ["task"], 1_000_000_000))


def test_what_is_declared_is_checked_first(tmp_path, monkeypatch):
    path = write(tmp_path / "many.parquet", 1000)
    with pytest.raises(DatasetError, match="bytes in a row group, at most 1000 are read"):
        next(parquet.read_portions(path, ["task"], 1000))
    monkeypatch.setattr(parquet, "MOST_VALUES", 999)
    with pytest.raises(DatasetError, match="1000 values of n in a row group"):
        next(parquet.read_portions(path, ["n"], 1_000_000))


def test_row_groups_of_other_episodes_are_not_read(tmp_path):
    path = tmp_path / "episodes.parquet"
    with pq.ParquetWriter(path, pa.schema([("episode_index", pa.int64())])) as writer:
        for episode in range(3):
            writer.write_table(pa.table({"episode_index": [episode] * 4}))
    read = [
        batch["episode_index"].to_pylist() for batch in parquet.read_portions(path, ["episode_index"], 1000, only=1)
    ]
    assert read == [[1] * 4]
