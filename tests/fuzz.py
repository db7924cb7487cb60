"""Mutations of real folders, opened in this process: a KiEdgeError, an OSError that names a file, or success.

`python tests/fuzz.py --cases 5000 --seed 1 CHECKPOINT [BUNDLE...]` runs many and counts; `tests/test_fuzz.py` keeps a
few hundred. Every case is reproducible from its seed: `--only N` runs one.
"""

import argparse
import collections
import copy
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

from ki_edge.bundle import Bundle
from ki_edge.checkpoints import Checkpoint
from ki_edge.errors import KiEdgeError
from ki_edge.policy.contract import PolicyContract
from ki_edge.policy.fast import FastCodec
from ki_edge.policy.normalize import read_norm_stats
from ki_edge.recordings.collection import open_recordings
from ki_edge.recordings.episodes import EpisodeView
from ki_runtime.policy.assets import read_assets
from ki_runtime.policy.denoise import runtime_weights

HEADS = (
    "manifest.json",
    "config.json",
    "contract.json",
    "norm_stats.json",
    "info.json",
)  # changed more often than others
LIMIT = 20  # seconds of one case: none takes one
VALUES = [
    None, True, False, 0, -1, 1, 2**62, 10**30, 1.5, -0.0, 1e308, "", "x", "\x1b[2J", "\u202e", "a\0b",
    "../../etc/passwd", "/etc/passwd", "x" * 10_000, [], {}, [[]], [1, "a", None], {"a": {"b": []}}, [0] * 10_000,
    "NaN", "\ud800",
]  # fmt: skip
RAW = [
    b"",
    b"{",
    b"[" * 100_000,
    b"null",
    b"[]",
    b'{"a":1e999}',
    b"\xff\xfe",
    b'{"a":Infinity}',
    b"\0" * 100,
    b"9" * 9000,
]


def places(value, path=()):
    """Paths of all values inside a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items)[:200]:
        yield from places(inner, (*path, key))


def change_json(file, rng):
    """One value becomes another of any type, vanishes, or is joined by a stranger."""
    content = json.loads(file.read_bytes())
    path = rng.choice([place for place in places(content) if place] or [()])
    if not path:
        file.write_bytes(rng.choice(RAW))
        return "json: raw"
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    kind = rng.choice(["value", "value", "value", "remove", "rename", "twin"])
    if kind == "remove":
        del parent[path[-1]]
    elif kind == "rename" and isinstance(parent, dict):
        parent[rng.choice(["", "\x1b", "x" * 3000, "../x", "\u202e"])] = parent.pop(path[-1])
    elif kind == "twin" and isinstance(parent, list):
        parent.extend([copy.deepcopy(parent[path[-1]])] * rng.choice([1, 3000]))
    else:
        parent[path[-1]] = rng.choice(VALUES)
    file.write_text(json.dumps(content), encoding="utf-8")
    return f"json: {kind}"


def change_bytes(file, rng):
    content = bytearray(file.read_bytes())
    kind = rng.choice(["flip", "flip", "cut", "grow", "raw"])
    if kind == "flip" and content:
        for _ in range(rng.choice([1, 8, 64])):
            place = rng.randrange(min(len(content), rng.choice([16, 2000, len(content)])))
            content[place] = rng.randrange(256)
    elif kind == "cut":
        del content[rng.randrange(len(content) + 1) :]
    elif kind == "grow":
        content += rng.randbytes(rng.choice([1, 5000]))
    else:
        content = rng.choice(RAW)
    file.write_bytes(content)
    return f"bytes: {kind}"


def replace_file(file, rng):
    """Another kind of file in its place."""
    file.unlink()
    kind = rng.choice(["fifo", "folder", "zero", "loop", "gone", "dangling", "outside"])
    targets = {"zero": "/dev/zero", "loop": file.name, "dangling": "nowhere", "outside": "/etc/hostname"}
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind in targets:
        file.symlink_to(targets[kind])
    return f"file: {kind}"


def open_everything(folder):
    """What every command does with a folder before it computes anything."""
    if (folder / "manifest.json").is_symlink() or (folder / "manifest.json").exists():
        bundle = Bundle.open(folder)
        _ = bundle.manifest.config, bundle.manifest.vocabulary.ids[:1]
        runtime_weights(bundle)
        assets = read_assets(bundle)
        if assets.fast_folder is not None:
            FastCodec.load(assets.fast_folder).decode([1], 4, 4)
        for graph in bundle.manifest.graphs:
            bundle.graph(graph)
        return
    if (folder / "meta").exists():
        recordings = open_recordings(folder)
        for number in range(len(recordings)):
            view = EpisodeView(recordings.episode(number))
            for step in range(min(len(view), 20)):
                view.observation(step)
        return
    checkpoint = Checkpoint.open(folder, default_horizon=10)
    for key in list(checkpoint.source.tensors)[:3]:
        checkpoint.source.rows(key, 0, 1)
    if os.path.lexists(folder / "contract.json"):
        PolicyContract.load(folder / "contract.json")
    if os.path.lexists(folder / "assets"):
        read_norm_stats(folder / "assets")


def mutate(folder, rng):
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    heads = [path for path in files if path.name in HEADS]
    file = rng.choice(heads if heads and rng.random() < 0.4 else files)
    changes = [change_bytes, replace_file] + [change_json] * (4 if file.suffix == ".json" else 0)
    try:
        kind = rng.choice(changes)(file, rng)
    except (ValueError, RecursionError):  # an earlier change left no JSON, or half a character cannot be written
        kind = change_bytes(file, rng)
    return f"{kind} of {file.suffix or file.name}"


def hangs(*_):
    raise AssertionError(f"still busy after {LIMIT} s")


def run_case(source, seed, room):
    """(what was changed, the error's name or "opened"); AssertionError for anything that is not allowed."""
    rng = random.Random(f"{source.name}/{seed}")
    folder = Path(tempfile.mkdtemp(dir=room)) / "folder"
    shutil.copytree(source, folder, symlinks=True)
    changed = [mutate(folder, rng) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(LIMIT)
    try:
        open_everything(folder)
        return changed, "opened"
    except KiEdgeError as error:
        text = str(error)
        assert "\n" not in text, f"{source.name} {seed} {changed}: {text[:200]!r}"
        return changed, type(error).__name__
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        raise AssertionError(f"{source.name} {seed} {changed}: {error!r:.200} at {where}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        shutil.rmtree(folder.parent)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    counts, failures = collections.Counter(), []
    seeds = [options.only] if options.only is not None else range(options.seed, options.seed + options.cases)
    with tempfile.TemporaryDirectory() as room:
        for at, seed in enumerate(seeds):
            try:
                changed, result = run_case(options.folders[at % len(options.folders)], seed, room)
                counts[f"{changed[0].split(' of ')[0]:16} {result}"] += 1
            except AssertionError as error:
                failures.append(str(error))
                sys.stderr.write(f"FAILED {error}\n")
    for line, count in sorted(counts.items()):
        sys.stdout.write(f"{count:6} {line}\n")
    sys.stdout.write(f"{sum(counts.values())} of {len(seeds)} as they should be, {len(failures)} failures\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
