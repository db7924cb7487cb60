"""What a run is made of, in OUT/training/run.json: its settings, what it was started from, and facts of data and code.

A run that is resumed must be made of the same, so each step is the one that an uninterrupted run would have taken.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ki_edge.errors import ArgumentError, CheckpointError
from ki_edge.files.reading import read_object
from ki_edge.files.writing import write_file, writing
from ki_edge.planning.settings import TrainSettings

FILE = "run.json"
FORMAT = 2
# what changes nothing that is learnt
FREE = frozenset({"save_every", "log_every", "eval_every", "keep", "eval_robot", "eval_episodes"})
SHOWN = 4  # differences that a message names
# folders of this package that decide what is computed
CODE = ("train", "planning", "model", "policy", "recordings", "checkpoints")
PAIRS: Mapping[str, type] = {"rates": float, "lora": int}  # settings of (group, number) pairs
NOTHING = "{out} holds no training run to resume: leave --resume out to start one"


@dataclass(frozen=True)
class Origin:
    """What a run is started from, as the command line has it; paths are absolute, "" and () where nothing was given."""

    datasets: tuple[str, ...] = ()
    preset: str = ""
    init: str = ""
    map: str = ""
    horizon: int = 0
    tokenizer: str = ""
    fast: str = ""
    fast_vocabulary: int = 0
    fast_placement: str = ""
    contract: str = ""
    base: str = ""
    lerobot_version: str = ""
    eval_robot: str = ""
    eval_episodes: int = 0


@dataclass(frozen=True)
class RunRecord:
    """`facts`: flat JSON values, such as digests, of data, model and code."""

    settings: TrainSettings
    origin: Origin
    facts: Mapping[str, Any]

    @classmethod
    def read(cls, out: Path) -> RunRecord:
        """The record of the run in OUT. ArgumentError if there is none, CheckpointError if it is damaged."""
        path = out / "training" / FILE
        if not path.is_file():
            raise ArgumentError(NOTHING.format(out=out))
        content = read_object(path, CheckpointError)
        if content.get("format") != FORMAT:
            raise CheckpointError(f"{path}: of another version of ki-train: start over with --fresh")
        facts = content.get("facts")
        if not isinstance(facts, dict):
            raise CheckpointError(f"{path}: its facts are no object")
        return cls(
            _read(TrainSettings, content.get("settings"), path), _read(Origin, content.get("origin"), path), facts
        )

    def write(self, out: Path) -> None:
        """Replace the record in OUT at once."""
        content = {"format": FORMAT, "settings": asdict(self.settings), "origin": asdict(self.origin)}
        path = out / "training" / FILE
        with writing(path, CheckpointError):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps({**content, "facts": dict(self.facts)}, indent=1) + "\n", CheckpointError)

    def differences(self, now: RunRecord) -> list[str]:
        """What a resumed run would change, a sentence each."""
        found = []
        for one, other in ((self.settings, now.settings), (self.origin, now.origin)):
            before, after = asdict(one), asdict(other)
            for name in before:
                if before[name] != after[name] and name not in FREE:
                    found.append(f"{name}: the run has {_short(before[name])}, now {_short(after[name])}")
        for name in {**self.facts, **now.facts}:
            if self.facts.get(name) != now.facts.get(name):
                found.append(f"{name}: the run has {_short(self.facts.get(name))}, now {_short(now.facts.get(name))}")
        return found

    def check(self, now: RunRecord, out: Path, *, accept: bool) -> list[str]:
        """The differences, if they are accepted; ArgumentError names them otherwise."""
        found = self.differences(now)
        if found and not accept:
            more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            raise ArgumentError(
                f"{out} cannot be resumed: {'; '.join(found[:SHOWN])}{more}. Resume with what it was started with, say "
                "--accept-changes, or start another run, from its weights with --init"
            )
        return found


def code_facts() -> dict[str, str]:
    """Digests of what computes a step: this package's own files, and the versions of torch and numpy."""
    import numpy
    import torch

    digest, home = hashlib.sha256(), Path(__file__).parents[1]
    folders = [path for folder in CODE for path in (home / folder).rglob("*.py")]
    for path in sorted([*folders, *home.glob("*.py")]):
        digest.update(f"{path.relative_to(home)}\0".encode() + path.read_bytes())
    return {"code": digest.hexdigest()[:16], "torch": torch.__version__, "numpy": numpy.__version__}


def _read(kind: type[Any], content: object, path: Path) -> Any:
    """A flat dataclass from its JSON form. CheckpointError for anything else."""
    known = {field.name: type(field.default) for field in fields(kind)}
    if not isinstance(content, dict) or content.keys() != known.keys():
        raise CheckpointError(f"{path}: not what this version of ki-train writes: start over with --fresh")
    found = {name: _tuples(value) for name, value in content.items()}
    for name, value in found.items():
        whole = known[name] is float and type(value) is int
        if type(value) is not known[name] and not whole:
            raise CheckpointError(f"{path}: {name} is {value!r:.60}, expected {known[name].__name__}")
        if isinstance(value, tuple) and not all(_is_item(item, PAIRS.get(name)) for item in value):
            raise CheckpointError(f"{path}: {name} is {value!r:.60}: not what ki-train writes")
    return kind(**found)


def _is_item(item: object, number: type | None) -> bool:
    """A name, or where a `number` belongs to it a pair of both."""
    if number is None or not isinstance(item, tuple):
        return number is None and type(item) is str
    return len(item) == 2 and type(item[0]) is str and type(item[1]) in {number, int}


def _tuples(value: object) -> object:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
