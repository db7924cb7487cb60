"""Arrays of an orbax folder through tensorstore, with the memory of the part that is asked for.

orbax stores an array in chunks as large as one device's share of it: on one device a single chunk of up to 4.8 GB, and
a chunk can only be decompressed from its start. tensorstore decompresses whole chunks in memory, for every slice again
(measured on a chunk of 2.4 GB: 3.1 GB and 10 s a layer). So chunks above STREAM are decompressed here as a stream that
stays open and goes on where the last slice ended: reading layers in ascending order decompresses every chunk once,
going back starts its chunk over. An open stream costs about 3 MB. Small chunks, other compressions than zstd, and
zarr3 shards of several chunks are left to tensorstore.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.dtypes import FLOATS
from ki_edge.errors import CheckpointError

from .values import Value, database_values, file_value

Array = npt.NDArray[Any]
STREAM = 1 << 24  # bytes of a chunk, decompressed
READ = 1 << 20  # compressed bytes read at once
MAX_STREAMS = 256
MAX_CHUNKS = 100_000  # of an array
DTYPES = {dtype.name: dtype.stored for dtype in FLOATS.values()}
SMALL = {
    "cache_pool": {"total_bytes_limit": 1 << 24},
    "data_copy_concurrency": {"limit": 1},
    "file_io_concurrency": {"limit": 1},
}


class ArrayStore:
    """The arrays below a folder: `ocdbt` in one database, otherwise a folder for each; zarr version 2 or 3.

    With `complete`, a chunk that is not there is damage; otherwise old orbax left it out because it holds only zeros.
    """

    def __init__(self, folder: Path, *, ocdbt: bool, zarr3: bool, complete: bool) -> None:
        self.folder = folder
        self.tensorstore, self.zstandard = _library("tensorstore"), _library("zstandard")
        self.context = self.tensorstore.Context(SMALL)
        self.driver = "zarr3" if zarr3 else "zarr"
        self.complete = complete
        files = {"driver": "file", "path": f"{folder.resolve()}/"}
        self.kvstore = {"driver": "ocdbt", "base": files} if ocdbt else files
        with self.errors("its database"):
            self.database = database_values(self.tensorstore, folder) if ocdbt else None
        self.streams: dict[str, _Stream] = {}

    def open(self, name: str) -> StoredArray:
        """Shape, type and layout of an array; CheckpointError if it or a chunk of it is not there."""
        kvstore = {**self.kvstore, "path": f"{self.kvstore.get('path', '')}{name}/"}
        spec = {"driver": self.driver, "kvstore": kvstore, "fill_missing_data_reads": not self.complete}
        with self.errors(f"'{name}'"):
            array = StoredArray(self, name, self.tensorstore.open(spec, context=self.context, read=True).result())
            for key in array.chunks():
                if self.value(key) is None:
                    if self.complete:
                        raise ValueError(f"chunk {key} is not there")
                    array.streamed = False  # zeros that were not written
        return array

    def value(self, key: str) -> Value | None:
        """Where the value of a key lies; None if it was not written."""
        return file_value(self.folder, key) if self.database is None else self.database.get(key)

    def stream(self, key: str, inner: bool) -> _Stream:
        """The open stream of a chunk; the one that was opened first is closed if there are too many."""
        if key not in self.streams:
            if len(self.streams) >= MAX_STREAMS:
                del self.streams[next(iter(self.streams))]
            self.streams[key] = _Stream(self, key, inner)
        return self.streams[key]

    @contextlib.contextmanager
    def errors(self, what: str) -> Iterator[None]:
        """Turn a failed read into one line."""
        try:
            yield
        except (CheckpointError, MemoryError):
            raise
        except Exception as error:  # tensorstore's and zstandard's have no common class of their own
            reason = str(error).split(" [")[0].splitlines()[0][:300] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{self.folder}: {what} cannot be read, a file is missing, truncated or damaged "
                f"({reason}): copy the folder again"
            ) from None


class StoredArray:
    """One array: safetensors' name of its type, shape, and the values of a part of it."""

    def __init__(self, store: ArrayStore, name: str, array: Any) -> None:
        self.store, self.name, self.array = store, name, array
        self.shape = tuple(int(size) for size in array.shape)
        if array.dtype.name not in DTYPES:
            raise CheckpointError(
                f"{store.folder}: '{name}' has dtype {array.dtype.name}, expected one of {', '.join(DTYPES)}"
            )
        self.dtype = DTYPES[array.dtype.name]
        metadata = array.spec().to_json()["metadata"]
        self.separator = metadata.get("dimension_separator", ".") if store.driver == "zarr" else "/"
        self.chunk = tuple(int(size) for size in array.chunk_layout.write_chunk.shape)
        whole = math.prod(max(size, 1) for size in self.shape)
        if math.prod(self.chunk) > max(4 * whole, STREAM):
            raise CheckpointError(
                f"{store.folder}: a chunk of '{name}' {list(self.chunk)} is larger than the whole array"
            )
        self.streamed = math.prod(self.chunk) * FLOATS[self.dtype].nbytes > STREAM and _streamable(metadata)
        self.inner = store.driver == "zarr3" and metadata["codecs"][0]["name"] == "sharding_indexed"

    def chunks(self) -> Iterator[str]:
        """Keys of its chunks."""
        counts = [-(-size // chunk) for size, chunk in zip(self.shape, self.chunk, strict=True)]
        if math.prod(counts) > MAX_CHUNKS:
            raise CheckpointError(
                f"{self.store.folder}: '{self.name}' has {math.prod(counts)} chunks, at most {MAX_CHUNKS}"
            )
        return (self.key(number) for number in itertools.product(*map(range, counts)))

    def key(self, number: tuple[int, ...]) -> str:
        """Name of the chunk with these numbers along the axes."""
        numbers = [*(["c"] if self.store.driver == "zarr3" else []), *map(str, number)]
        return f"{self.name}/{self.separator.join(numbers)}"

    def read(self, index: tuple[int, ...], start: int, stop: int) -> Array:
        """array[index][start:stop] in the stored type, bfloat16 as its bits."""
        with self.store.errors(f"'{self.name}'"):
            if self.streamed:
                return self._streamed(index, start, stop)
            values = self.array[(*index, slice(start, stop))].read().result()
            return np.ascontiguousarray(values).view(FLOATS[self.dtype].numpy)
        raise AssertionError  # errors() never swallows one

    def _streamed(self, index: tuple[int, ...], start: int, stop: int) -> Array:
        """Each chunk holds one contiguous run of the part: leading indices, rows, then all of its other axes."""
        axis, dtype = len(index), np.dtype(FLOATS[self.dtype].numpy)
        out = np.empty((stop - start, *self.shape[axis + 1 :]), dtype)
        rows, others = self.chunk[axis], self.chunk[axis + 1 :]
        size = math.prod(others) * dtype.itemsize  # of a row in a chunk
        grid = (range(-(-self.shape[at] // self.chunk[at])) for at in range(axis + 1, len(self.shape)))
        columns = list(itertools.product(*grid))
        for number, column in itertools.product(range(start // rows, -(-stop // rows)), columns):
            first, last = max(start, number * rows), min(stop, (number + 1) * rows)
            offset = 0
            for at, position in enumerate(index):
                offset = offset * self.chunk[at] + position % self.chunk[at]
            offset = (offset * rows + first - number * rows) * size
            leading = tuple(position // chunk for position, chunk in zip(index, self.chunk, strict=False))
            stream = self.store.stream(self.key((*leading, number, *column)), self.inner)
            part = tuple(slice(at * chunk, (at + 1) * chunk) for at, chunk in zip(column, others, strict=True))
            target = out[(slice(first - start, last - start), *part)]
            if target.flags.c_contiguous and target.shape[1:] == others:
                stream.read(offset, target)
            else:
                values = np.empty((last - first, *others), dtype)
                stream.read(offset, values)
                target[...] = values[(slice(None), *(slice(0, extent) for extent in target.shape[1:]))]
        return out


class _Stream:
    """A zstd chunk, decompressed forward; a position before the current one starts it over."""

    def __init__(self, store: ArrayStore, key: str, inner: bool) -> None:
        self.store, self.key = store, key
        value = store.value(key)
        if value is None:
            raise ValueError(f"chunk {key} is gone")
        self.value, self.begin = value, 0
        if inner:  # zarr3 shard: its one chunk, found by the index before the checksum at the end
            self.begin, _ = struct.unpack("<QQ", value.read(value.size - 20, value.size - 4))
        self._restart()

    def _restart(self) -> None:
        source = _Source(self.value, self.begin)
        self.reader = self.store.zstandard.ZstdDecompressor().stream_reader(source, READ)
        self.position = 0

    def read(self, offset: int, out: Array) -> None:
        """Fill a contiguous array with the bytes from `offset`."""
        if offset < self.position:
            self._restart()
        skipped = memoryview(bytearray(min(READ, offset - self.position)))
        while self.position < offset:
            self._fill(skipped[: min(len(skipped), offset - self.position)])
        self._fill(out.reshape(-1).view(np.uint8).data)

    def _fill(self, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = self.reader.readinto(buffer[done:])
            if not count:
                raise ValueError(f"chunk {self.key} ends after {self.position + done} bytes")
            done += count
        self.position += done


class _Source:
    """The compressed bytes of a value as a file for zstandard."""

    def __init__(self, value: Value, position: int) -> None:
        self.value, self.position = value, position

    def read(self, size: int) -> bytes:
        content = self.value.read(self.position, self.position + size)
        self.position += len(content)
        return content


def _streamable(metadata: dict[str, Any]) -> bool:
    """Row-major, little endian, zstd and nothing else, one compressed chunk for each stored value."""
    if "codecs" not in metadata:
        compressor = (metadata.get("compressor") or {}).get("id")
        plain = metadata.get("order") == "C" and not metadata.get("filters")
        return compressor == "zstd" and plain and not str(metadata["dtype"]).startswith(">")
    codecs, encoding = metadata["codecs"], metadata["chunk_key_encoding"]
    if codecs[0]["name"] == "sharding_indexed":
        settings = codecs[0]["configuration"]
        whole = settings["chunk_shape"] == metadata["chunk_grid"]["configuration"]["chunk_shape"]
        index = [codec["name"] for codec in settings["index_codecs"]] == ["bytes", "crc32c"]
        if not (whole and index and settings.get("index_location", "end") == "end" and len(codecs) == 1):
            return False
        codecs = settings["codecs"]
    little = codecs[0].get("configuration", {}).get("endian") == "little"
    return [codec["name"] for codec in codecs] == ["bytes", "zstd"] and little and encoding == {"name": "default"}


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise CheckpointError(
            f"a JAX checkpoint is read through {name}, which is not installed: pip install 'ki-edge[jax]'"
        ) from None
