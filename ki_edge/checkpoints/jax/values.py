"""Where the values of an orbax folder lie: key -> bytes of a file, of an OCDBT database or of a folder of plain files.

OCDBT is tensorstore's B+tree of small nodes that point into large data files (tensorstore kvstore/ocdbt). tensorstore
decodes the nodes; the data is read here, since the reads of tensorstore 0.1.78 (the last for Python 3.10) cannot be of
a part. This also tells at once whether a file is missing or cut off, which tensorstore reads as an empty value.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ki_edge.errors import CheckpointError

MAX_NODES = 100_000
MAX_VALUES = 1_000_000


@dataclass(frozen=True)
class Value:
    """`size` bytes of a file from `offset` on, or the bytes themselves where there is no file."""

    size: int
    path: Path | None = None
    offset: int = 0
    inline: bytes = b""

    def read(self, start: int, stop: int) -> bytes:
        """Bytes start..stop, fewer beyond the end."""
        stop = min(stop, self.size)
        if self.path is None:
            return self.inline[start:stop]
        with self.path.open("rb") as file:
            file.seek(self.offset + start)
            return file.read(max(0, stop - start))


def file_value(folder: Path, key: str) -> Value | None:
    """The value of a key in a folder of plain files; None if there is no such file."""
    path = folder / key
    return Value(path.stat().st_size, path) if path.is_file() else None


def database_values(tensorstore: Any, folder: Path) -> dict[str, Value]:
    """The values of the newest version of an OCDBT database.

    CheckpointError for a data file that is missing or shorter than what points into it; tensorstore's ValueError for
    damaged nodes.
    """
    base = tensorstore.KvStore.open({"driver": "file", "path": f"{folder.resolve()}/"}).result()
    values: dict[str, Value] = {}
    sizes: dict[Path, int] = {}
    root = tensorstore.ocdbt.dump(base).result()["versions"][-1]["root"]
    pending = [(b"", root["location"])] if "location" in root else []
    nodes = 0
    while pending:
        prefix, location = pending.pop()
        nodes += 1
        for entry in tensorstore.ocdbt.dump(base, location).result()["entries"]:
            key = prefix + entry["key"]
            if "location" in entry:
                pending.append((prefix + entry["subtree_common_prefix"], entry["location"]))
            elif "inline_value" in entry:
                values[key.decode()] = Value(len(entry["inline_value"]), inline=entry["inline_value"])
            else:
                values[key.decode()] = _indirect(folder, entry["indirect_value"], sizes)
        if nodes > MAX_NODES or len(values) > MAX_VALUES:
            raise CheckpointError(f"{folder}: its database has more than {MAX_NODES} nodes or {MAX_VALUES} values")
    return values


def _indirect(folder: Path, location: str, sizes: dict[Path, int]) -> Value:
    """A place as tensorstore writes it, value:<base path>:<relative path>:<offset>:<length>, paths percent-encoded."""
    _, base, relative, offset, length = location.split(":")
    name = unquote(base) + unquote(relative)
    path = folder / name
    if name.startswith("/") or ".." in Path(name).parts:
        raise CheckpointError(f"{folder}: its database points outside the folder, to {name!r}")
    if path not in sizes:
        sizes[path] = path.stat().st_size if path.is_file() else -1
    value = Value(int(length), path, int(offset))
    if value.offset + value.size > sizes[path]:
        what = f"has {sizes[path]} bytes" if sizes[path] >= 0 else "is missing"
        expected = f"expected at least {value.offset + value.size} bytes"
        raise CheckpointError(f"{folder}: its data file {name} {what}, {expected}: copy the folder again")
    return value
