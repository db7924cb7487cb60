"""What makes a model a policy: contract.json, and the assets folder with tokenizer, statistics and FAST codec."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from ki_edge.bundle import DecodeVocabulary
from ki_edge.config import Pi05Config
from ki_edge.contract import PolicyContract
from ki_edge.errors import CheckpointError
from ki_edge.model import Checkpoint
from ki_edge.normalize import read_norm_stats
from ki_edge.prompt import PromptTokenizer

CONTRACT = "contract.json"
ASSETS = "assets"
TOKENIZER = "tokenizer.model"
NORM_STATS = "norm_stats.json"
CODEC = "tokenizer.json"  # of the folder that the contract's `fast` names


@dataclass(frozen=True, eq=False)
class PolicyFiles:
    """A checkpoint's contract and assets, read and found to agree with its model."""

    folder: Path
    contract: PolicyContract
    tokenizer: PromptTokenizer

    @classmethod
    def open(cls, checkpoint: Checkpoint) -> PolicyFiles:
        """CheckpointError lists every file that is missing; ContractError and it say what does not fit."""
        folder = checkpoint.path
        missing = [name for name in (CONTRACT, f"{ASSETS}/{TOKENIZER}") if not (folder / name).is_file()]
        contract = None if CONTRACT in missing else PolicyContract.load(folder / CONTRACT)
        if contract is None or contract.normalization != "none":
            missing += _absent(folder, f"{ASSETS}/{NORM_STATS}")
        if contract is not None and contract.fast is not None:
            missing += _absent(folder, f"{ASSETS}/{contract.fast.folder}/{CODEC}")
        if missing or contract is None:
            raise CheckpointError(
                f"{folder} holds a model, not a policy: no {', no '.join(missing)}; add them as ki-train writes them, "
                "or export the model alone with --model-only"
            )
        model = folder / ASSETS / TOKENIZER
        files = cls(folder, contract, PromptTokenizer(model, contract.prompt_format, contract.max_token_len))
        files.check(checkpoint.config)
        return files

    def check(self, config: Pi05Config) -> None:
        """CheckpointError unless contract and tokenizer fit the model."""
        contract = self.contract
        size = config.vision.image_size
        fits = {
            "action_horizon": (contract.action_horizon, config.action_horizon),
            "model_action_dim": (contract.model_action_dim, config.action_dim),
            "image_size": (contract.image_size, (size, size)),
        }
        for name, (given, expected) in fits.items():
            if given != expected:
                raise CheckpointError(f"{self.folder / CONTRACT}: {name} is {given}, the model's is {expected}")
        ids = {"tokenizer": self.tokenizer.vocab_size - 1, "fast": contract.fast.id_offset if contract.fast else 0}
        for name, largest in ids.items():
            if largest >= config.vocab_size:
                raise CheckpointError(
                    f"{self.folder}: the {name} has ids up to {largest}, the model's embedding {config.vocab_size} rows"
                )
        if contract.normalization != "none":
            read_norm_stats(self.folder / ASSETS / NORM_STATS)

    def copy(self, bundle: Path) -> None:
        """Copy the assets into a bundle's folder."""
        shutil.copytree(self.folder / ASSETS, bundle / ASSETS)


def decode_vocabulary(config: Pi05Config, files: PolicyFiles | None, *, full: bool) -> DecodeVocabulary:
    """Columns of the FAST logits: the FAST ids, "|" and eos; all tokens if `full` or if no contract tells them."""
    fast = files.contract.fast if files is not None else None
    if full or files is None or fast is None:
        return DecodeVocabulary(0, config.vocab_size)
    first = fast.id_offset - fast.size + 1
    extra = dict.fromkeys((*files.tokenizer.end_ids, files.tokenizer.eos_id))
    outside = tuple(token for token in extra if not first <= token <= fast.id_offset)
    return DecodeVocabulary(first, fast.size, outside)


def _absent(folder: Path, name: str) -> list[str]:
    return [] if (folder / name).is_file() else [name]
