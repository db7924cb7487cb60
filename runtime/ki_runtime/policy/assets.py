"""What a bundle holds of a policy besides its model: contract, tokenizer, statistics, codec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ki_edge.bundle import Bundle
from ki_edge.errors import BundleError
from ki_edge.policy.contract import PolicyContract
from ki_edge.policy.normalize import NormStats, read_norm_stats
from ki_edge.policy.prompt import PromptTokenizer

from .decode import TOKENIZERS, read_tokenizer

NORM_STATS = "assets/norm_stats.json"


@dataclass(frozen=True, eq=False)
class PolicyAssets:
    """What a policy needs besides its model."""

    contract: PolicyContract
    tokenizer: PromptTokenizer
    stats: Mapping[str, NormStats]  # "state", "actions"; empty without normalisation
    fast_folder: Path | None  # of the FAST codec, read at the first use


def read_assets(bundle: Bundle) -> PolicyAssets:
    """Contract, tokenizer and statistics of a bundle; BundleError names what is missing or contradicts the model."""
    manifest = bundle.manifest
    contract = None if manifest.contract is None else PolicyContract.from_json(manifest.contract)
    wanted = {"contract": contract is not None, "tokenizer": any(name in manifest.files for name in TOKENIZERS)}
    if contract is None or contract.needs_stats:
        wanted["norm_stats"] = NORM_STATS in manifest.files
    missing = [name for name, there in wanted.items() if not there]
    if missing or contract is None:
        raise BundleError(
            f"{bundle.path} holds a model, not a policy: it has no {', no '.join(missing)}. "
            "Open it as a Sampler, or export it again with them"
        )
    _check_contract(bundle, contract)
    fast = contract.fast
    has_codec = fast is not None and f"assets/{fast.folder}/tokenizer.json" in manifest.files
    return PolicyAssets(
        contract,
        read_tokenizer(bundle, contract),
        read_norm_stats(bundle.file(NORM_STATS)) if "norm_stats" in wanted else {},
        bundle.path / "assets" / fast.folder if fast is not None and has_codec else None,
    )


def _check_contract(bundle: Bundle, contract: PolicyContract) -> None:
    config = bundle.manifest.config
    size = config.vision.image_size
    pairs = {
        "model_action_dim": (contract.model_action_dim, config.action_dim),
        "action_horizon": (contract.action_horizon, config.action_horizon),
        "image_size": (contract.image_size, (size, size)),
        f"pictures ({contract.resize})": (contract.pictures, config.pictures),
    }
    for name, (said, is_) in pairs.items():
        if said != is_:
            raise BundleError(f"{bundle.path}: the contract's {name} is {said}, the model's {is_}: export it again")
    if config.rtc == "trained" and contract.rtc_max_delay is None:
        raise BundleError(
            f"{bundle.path}: the model's rtc is trained, and the contract has no rtc_max_delay: export it again"
        )
    if config.has_state and contract.state_dim > config.state_size:
        raise BundleError(
            f"{bundle.path}: the contract's state has {contract.state_dim} numbers, the model takes at most "
            f"{config.state_size}: export it again"
        )
