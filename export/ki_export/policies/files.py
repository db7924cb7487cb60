"""A complete policy: its contract and assets; what goes into a bundle's assets/."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ki_edge.errors import ExportError
from ki_edge.files.writing import write_file
from ki_edge.policy.contract import PolicyContract
from ki_edge.policy.normalize import NormStats, write_norm_stats
from ki_edge.policy.prompt import PromptTokenizer

from .codecs import codec_files
from .statistics import NORM_STATS, Statistics
from .tokenizers import TokenizerFile


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

    def write(self, bundle: Path) -> None:
        """Write assets/ of a bundle: tokenizer, statistics, FAST codec."""
        assets = bundle / "assets"
        assets.mkdir()
        write_file(assets / self.tokenizer_file.name, self.tokenizer_file.content, ExportError)
        if self.statistics is not None:
            write_norm_stats(assets / NORM_STATS, self.stats)
        if self.codec is not None and self.contract.fast is not None:
            folder = assets / self.contract.fast.folder
            folder.mkdir()
            for name, content in codec_files(self.codec).items():
                (folder / name).write_bytes(content)
