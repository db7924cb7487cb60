"""Contracts by name: openpi's public training configurations, and short names for families of them.

openpi records none of this beside its weights: robot, cameras, prompt, normalisation and relative actions stand in the
configuration that a checkpoint was trained with (openpi/training/config.py and misc/, commit 15a9616).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ki_edge.config import Variant
from ki_edge.errors import ArgumentError

from .contract import PI0, PolicyContract, aloha, droid, droid_joint_position, libero, pi0_aloha, pi0_droid, pi0_libero

Make = Callable[..., PolicyContract]


@dataclass(frozen=True)
class Preset:
    """One name. `horizon`: actions of a chunk; None where the name's public configurations differ in it.

    `known`: the public configurations that share the contract, with their horizons.
    """

    name: str
    variant: Variant
    make: Make
    horizon: int | None
    fields: Mapping[str, Any] = field(default_factory=dict)
    known: Mapping[str, int] = field(default_factory=dict)

    def contract(self, **changes: Any) -> PolicyContract:
        """The contract; `changes` must hold `action_horizon` where the preset has none. ContractError."""
        horizon = {} if self.horizon is None else {"action_horizon": self.horizon}
        return self.make(**{**horizon, **self.fields, **changes})

    @property
    def horizons(self) -> str:
        """The public configurations' horizons, for a message: "15 (pi05_droid), 16 (pi05_droid_finetune)"."""
        return ", ".join(f"{horizon} ({name})" for name, horizon in self.known.items())


def find_preset(name: str) -> Preset | None:
    """The preset of a name; None for a name that is none. ArgumentError for a configuration without a contract."""
    if name in WITHOUT:
        raise ArgumentError(f"--contract {name}: {WITHOUT[name]}")
    return PRESETS.get(name)


def _public(variant: Variant, make: Make, horizon: int, *names: str, **fields: Any) -> dict[str, Preset]:
    return {name: Preset(name, variant, make, horizon, fields) for name in names}


POLARIS = {**PI0, "max_token_len": 100}
PUBLIC: Mapping[str, Preset] = {
    **_public("pi05", droid, 15, "pi05_droid"),
    **_public("pi05", droid, 16, "pi05_droid_finetune"),
    **_public("pi05", droid_joint_position, 16, "pi05_full_droid_finetune"),
    **_public("pi05", droid_joint_position, 15, "pi05_droid_jointpos_polaris"),
    **_public("pi05", libero, 10, "pi05_libero"),
    **_public("pi05", aloha, 50, "pi05_aloha"),
    **_public("pi05", aloha, 50, "pi05_aloha_pen_uncap", default_prompt="uncap the pen"),
    **_public("pi0", pi0_droid, 10, "pi0_droid"),
    **_public("pi0", pi0_droid, 10, "paligemma_diffusion_droid", model_action_dim=8),
    **_public(
        "pi0",
        droid_joint_position,
        10,
        "pi0_droid_jointpos_polaris",
        "pi0_droid_jointpos_100k_polaris",
        **POLARIS,
    ),
    **_public("pi0", pi0_libero, 50, "pi0_libero", "pi0_libero_low_mem_finetune"),
    **_public("pi0", pi0_aloha, 50, "pi0_aloha"),
    **_public("pi0", pi0_aloha, 50, "pi0_aloha_towel", default_prompt="fold the towel"),
    **_public(
        "pi0", pi0_aloha, 50, "pi0_aloha_tupperware",
        default_prompt="open the tupperware and put the food on the plate",
    ),
    **_public("pi0", pi0_aloha, 50, "pi0_aloha_pen_uncap", default_prompt="uncap the pen"),
    **_public("pi0", pi0_aloha, 50, "pi0_aloha_sim", default_prompt="Transfer cube", delta_mask=None),
}  # fmt: skip
SHORT: Mapping[str, tuple[str, ...]] = {
    "droid": ("pi05_droid", "pi05_droid_finetune"),
    "droid_joint_position": ("pi05_full_droid_finetune", "pi05_droid_jointpos_polaris"),
    "libero": ("pi05_libero",),
    "aloha": ("pi05_aloha",),
}


def _family(name: str, members: tuple[str, ...]) -> Preset:
    known = {member: horizon for member in members if (horizon := PUBLIC[member].horizon) is not None}
    horizons = set(known.values())
    return replace(PUBLIC[members[0]], name=name, horizon=horizons.pop() if len(horizons) == 1 else None, known=known)


PRESETS: Mapping[str, Preset] = {**{name: _family(name, members) for name, members in SHORT.items()}, **PUBLIC}

TOKENS = (
    "its model writes actions as tokens and has no flow head (π0-FAST and its like): only π0 and π0.5 can be exported"
)
FAKE = "it is trained on made-up data of no robot: give a contract file"
WITHOUT: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "pi0_fast_droid", "pi0_fast_libero", "pi0_fast_libero_low_mem_finetune", "pi0_fast_full_droid_finetune",
            "pi0_fast_droid_jointpos_polaris", "paligemma_binning_droid", "paligemma_binning_droid_jointpos",
            "paligemma_fast_droid", "paligemma_fast_specialist_droid", "paligemma_vq_droid",
        ),
        TOKENS,
    ),
    **dict.fromkeys(("debug", "debug_restore", "debug_pi05"), FAKE),
}  # fmt: skip
