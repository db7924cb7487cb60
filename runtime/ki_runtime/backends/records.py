"""Where what was found out on this machine is kept: beside the engine it is about, else in the user's cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def places(folder: Path, name: str) -> Iterator[Path]:
    """Where a file of this name may lie, the preferred place first. `name` tells what it is about by itself."""
    yield folder / name
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "")
    with suppress(RuntimeError):  # a user without a home
        yield (cache if cache.is_absolute() else Path.home() / ".cache") / "ki-edge" / "proofs" / name
