"""A policy's contract and assets, complete, and found to agree with its model; what goes into a bundle's assets/."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ki_edge.config import Pi05Config
from ki_edge.contract import Feature, PolicyContract
from ki_edge.errors import CheckpointError, ExportError
from ki_edge.normalize import NormStats, write_norm_stats
from ki_edge.prompt import PromptTokenizer
from ki_edge.writing import write_file

from .statistics import NORM_STATS, Statistics
from .tokenizers import TOKENIZER, TokenizerFile

CODEC = "tokenizer.json"
CODEC_FILES = ("processor_config.json", CODEC, "tokenizer_config.json", "special_tokens_map.json")
MAX_CODEC = 64_000_000  # bytes of one of them
FIELDS = {"quantile": ("q01", "q99"), "zscore": ("mean", "std"), "none": ()}


@dataclass(frozen=True, eq=False)
class PolicyFiles:
    """A contract with everything it needs. `known`: contract field -> what recorded it; `codec`: the FAST folder."""

    contract: PolicyContract
    tokenizer: PromptTokenizer
    tokenizer_file: TokenizerFile
    statistics: Statistics | None
    codec: Path | None
    known: Mapping[str, str]

    @property
    def stats(self) -> Mapping[str, NormStats]:
        """Statistics of "state" and "actions"; empty without normalisation."""
        return self.statistics.features if self.statistics is not None else {}

    @property
    def sources(self) -> dict[str, Any]:
        """Where the policy comes from, for a bundle's provenance: no path of this machine."""
        statistics = self.statistics
        return {
            "contract": dict(self.known),
            "tokenizer": {"from": self.tokenizer_file.source, "sha256": self.tokenizer_file.sha256},
            "statistics": statistics and {"from": statistics.source, "sha256": statistics.sha256},
        }

    def check(self, config: Pi05Config, *, exact: bool = False) -> None:
        """CheckpointError unless contract, statistics and tokenizer fit each other and the model.

        `exact`: statistics must have the contract's lengths, not at least these.
        """
        contract, size = self.contract, config.vision.image_size
        fits = {
            "action_horizon": (contract.action_horizon, config.action_horizon),
            "model_action_dim": (contract.model_action_dim, config.action_dim),
            "image_size": (contract.image_size, (size, size)),
        }
        for name, (given, expected) in fits.items():
            if given != expected:
                raise CheckpointError(f"policy contract: {name} is {given}, the model's is {expected}")
        if config.variant == "pi0" and contract.state_in_prompt:
            raise CheckpointError(
                f"policy contract: prompt format {contract.prompt_format} holds the state, which this π0 model takes "
                "as a token of its own: give a contract for π0, such as --contract pi0_droid"
            )
        self._check_ids(config.vocab_size)
        for feature, dim in (("state", contract.state_dim), ("actions", contract.action_dim)):
            self._check_statistics(feature, dim, exact)

    def write(self, bundle: Path) -> None:
        """Write assets/ of a bundle: tokenizer, statistics, FAST codec."""
        assets = bundle / "assets"
        assets.mkdir()
        write_file(assets / TOKENIZER, self.tokenizer_file.content, ExportError)
        if self.statistics is not None:
            write_norm_stats(assets / NORM_STATS, self.stats)
        if self.codec is not None and self.contract.fast is not None:
            folder = assets / self.contract.fast.folder
            folder.mkdir()
            for name in CODEC_FILES:
                if (self.codec / name).is_file():
                    shutil.copyfile(self.codec / name, folder / name)

    def _check_ids(self, vocabulary: int) -> None:
        fast = self.contract.fast
        ids = {"tokenizer": self.tokenizer.vocab_size - 1, "fast": fast.id_offset if fast is not None else 0}
        for name, largest in ids.items():
            if largest >= vocabulary:
                raise CheckpointError(f"the {name} has ids up to {largest}, the model's embedding {vocabulary} rows")

    def _check_statistics(self, feature: str, dim: int, exact: bool) -> None:
        assert feature in get_args(Feature)
        kind = self.contract.normalization_of(feature)  # type: ignore[arg-type]
        if kind == "none":
            return
        source = self.statistics.source if self.statistics is not None else "the checkpoint"
        entry = self.stats.get(feature)
        if entry is None:
            raise CheckpointError(f"{source}: no statistics of '{feature}', which {kind} normalisation needs")
        absent = [name for name in FIELDS[kind] if getattr(entry, name) is None]
        if absent:
            raise CheckpointError(f"{source}: '{feature}' has no {', '.join(absent)}, which {kind} normalisation needs")
        if entry.dim < dim or (exact and entry.dim != dim):
            raise CheckpointError(
                f"{source}: statistics whose length does not fit: '{feature}' has {entry.dim} numbers, the contract "
                f"{dim}: are they this robot's? give the right ones with --assets"
            )
