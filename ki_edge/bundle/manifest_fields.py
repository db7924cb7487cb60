"""What a bundle's manifest may say: the types and sizes of its fields, checked before anything believes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ki_edge.dtypes import KNOWN_PRECISIONS
from ki_edge.errors import BundleError
from ki_edge.graphs import GRAPHS

SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_FILES = 10_000
MAX_NAME = 500  # characters of a path in the bundle, or of a tensor
MAX_BYTES = 1 << 50  # of a file
MAX_OPSET = 1000
MAX_NAMES = 100_000  # tensors that the runtime is told of
MAX_EXTRA = 100_000  # tokens of the decode vocabulary beside its range


def check_fields(path: Path, data: Mapping[str, Any]) -> None:
    """BundleError, which names the manifest `path` and the field, for what no export writes."""
    try:
        _files(data["files"])
        _graphs(data["graphs"])
        _weights(data["weights"])
        _words(data)
    except _Wrong as wrong:
        raise BundleError(f"{path}: {wrong}") from None


class _Wrong(Exception):
    """What is wrong, without the manifest's path."""


def _files(files: Mapping[str, Any]) -> None:
    if len(files) > MAX_FILES:
        raise _Wrong(f"'files' has {len(files)} entries, at most {MAX_FILES} are read")
    seen: dict[str, str] = {}
    for name, facts in files.items():
        if len(name) > MAX_NAME or not name.isprintable():
            raise _Wrong(f"'files' has {name[:80]!r}, which cannot be the name of a file")
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise _Wrong(f"'files' has both '{other}' and '{name}', which are one file on some disks")
        size = facts.get("size") if isinstance(facts, dict) else None
        if type(size) is not int or not 0 <= size <= MAX_BYTES:
            raise _Wrong(f"files['{name}'] needs an integer size and a sha256")
        digest = facts.get("sha256")
        if not isinstance(digest, str) or not SHA256.fullmatch(digest):
            raise _Wrong(f"files['{name}'] needs a sha256 of 64 hexadecimal digits")


def _graphs(graphs: Mapping[str, Any]) -> None:
    known = [spec.name for spec in GRAPHS]
    foreign = sorted(set(graphs) - set(known))
    if foreign or not graphs:
        raise _Wrong(f"'graphs' has {foreign or 'nothing'!r:.80}, expected {', '.join(known)}")
    for name, graph in graphs.items():
        if not isinstance(graph, dict):
            raise _Wrong("every entry of 'graphs' must be an object")
        for side in ("inputs", "outputs"):
            if not isinstance(graph.get(side, {}), dict | list):
                raise _Wrong(f"graphs['{name}'] needs its {side} in a list or an object")
        for field, most in (("opset", MAX_OPSET), ("weight_bytes", MAX_BYTES)):
            number = graph.get(field, 0)
            if type(number) is not int or not 0 <= number <= most:
                raise _Wrong(f"graphs['{name}'] needs its {field} as an integer up to {most}")
        operators = graph.get("ops", [])
        if not isinstance(operators, list) or not all(isinstance(op, str) and _is_name(op) for op in operators):
            raise _Wrong(f"graphs['{name}'] needs its ops in a list of names")


def _weights(weights: Mapping[str, Any]) -> None:
    table = weights.get("embeddings", "one")
    if not isinstance(table, str) or not _is_name(table):
        raise _Wrong(f"'weights.embeddings' is {table!r:.80}, expected the name of a tensor")
    runtime = weights.get("runtime", {})
    if not isinstance(runtime, dict) or len(runtime) > MAX_NAMES:
        raise _Wrong(f"'weights.runtime' must be an object of at most {MAX_NAMES} names")
    for name, stored in runtime.items():
        if not isinstance(stored, str) or not _is_name(stored) or not _is_name(name):
            raise _Wrong(f"'weights.runtime' has {name[:80]!r}: {stored!r:.80}, expected names of tensors")
    budget = weights.get("budget_cosine")
    if budget is not None and (type(budget) is not float or not 0 < budget < 1):
        raise _Wrong(f"'weights.budget_cosine' is {budget!r:.40}, expected a number between 0 and 1")


def _words(data: Mapping[str, Any]) -> None:
    if data["precision"] not in KNOWN_PRECISIONS:
        raise _Wrong(
            f"precision {data['precision']!r:.40}, known are {', '.join(KNOWN_PRECISIONS)}: upgrade ki-edge, or export "
            "again"
        )
    for name, version in data["tools"].items():
        if not isinstance(version, str):
            raise _Wrong(f"tools['{name[:80]}'] is not text")
    if not isinstance(data["parity"].get("verified", False), bool):
        raise _Wrong("'parity.verified' must be true or false")
    extra = data["decode_vocabulary"].get("extra")
    if isinstance(extra, list) and len(extra) > MAX_EXTRA:
        raise _Wrong(f"'decode_vocabulary.extra' has {len(extra)} tokens, at most {MAX_EXTRA}")


def _is_name(text: str) -> bool:
    return 0 < len(text) <= MAX_NAME and text.isprintable()
