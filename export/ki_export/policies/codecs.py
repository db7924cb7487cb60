"""Where a FAST codec lies: a folder, as transformers 4 or 5 saved it, or a repository in the Hugging Face cache."""

from __future__ import annotations

from pathlib import Path

from ki_edge.errors import ArgumentError, CheckpointError, ContractError
from ki_edge.files.reading import read_file
from ki_edge.policy.fast import CODEC_FILE, CONFIG_FILE, MAX_CODEC, tokenizer_place

from .tokenizers import snapshots

COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json")


def find_codec(given: Path) -> Path:
    """The codec's folder in `given`: itself, or the newest snapshot below it. ContractError names what it lacks."""
    if not given.is_dir():
        raise ArgumentError(f"--fast-codec {given}: {'not a folder' if given.exists() else 'no such folder'}")
    folder = next(iter(snapshots(given)), given)
    lacks = [] if (folder / CONFIG_FILE).is_file() else [CONFIG_FILE]
    if not tokenizer_place(folder).is_file():
        lacks.append(CODEC_FILE)
    if lacks:
        inside = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise ContractError(
            f"--fast-codec {given}: no FAST codec, which has {CONFIG_FILE} and {CODEC_FILE} (also in bpe_tokenizer/): "
            f"{' and '.join(lacks)} missing, found {inside}"
        )
    return folder


def codec_files(folder: Path) -> dict[str, bytes]:
    """A codec's files in the published layout: name -> content. CheckpointError for one that is too large."""
    place = tokenizer_place(folder)
    paths = {CONFIG_FILE: folder / CONFIG_FILE, CODEC_FILE: place}
    paths |= {name: place.parent / name for name in COMPANIONS if (place.parent / name).is_file()}
    return {name: read_file(path, MAX_CODEC, CheckpointError) for name, path in paths.items()}
