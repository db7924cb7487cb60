"""openpi's public configurations, by their names. The table is openpi's src/openpi/training/config.py and misc/."""

import pytest

from ki_edge.errors import ArgumentError, ContractError
from ki_edge.policy.contract import make_mask
from ki_edge.policy.presets import PRESETS, PUBLIC, SHORT, WITHOUT, find_preset

JOINTS, ARMS = make_mask(7, -1), make_mask(6, -1, 6, -1)
# name: robot, model, horizon, longest prompt, delta mask, default prompt
TABLE = {
    "pi0_aloha": ("aloha", "pi0", 50, 48, ARMS, None),
    "pi05_aloha": ("aloha", "pi05", 50, 200, ARMS, None),
    "pi0_aloha_towel": ("aloha", "pi0", 50, 48, ARMS, "fold the towel"),
    "pi0_aloha_tupperware": ("aloha", "pi0", 50, 48, ARMS, "open the tupperware and put the food on the plate"),
    "pi0_droid": ("droid", "pi0", 10, 48, None, None),
    "pi05_droid": ("droid", "pi05", 15, 200, None, None),
    "pi0_libero": ("libero", "pi0", 50, 48, make_mask(6, -1), None),
    "pi0_libero_low_mem_finetune": ("libero", "pi0", 50, 48, make_mask(6, -1), None),
    "pi05_libero": ("libero", "pi05", 10, 200, None, None),
    "pi0_aloha_pen_uncap": ("aloha", "pi0", 50, 48, ARMS, "uncap the pen"),
    "pi05_aloha_pen_uncap": ("aloha", "pi05", 50, 200, ARMS, "uncap the pen"),
    "pi05_full_droid_finetune": ("droid", "pi05", 16, 200, JOINTS, None),
    "pi05_droid_finetune": ("droid", "pi05", 16, 200, None, None),
    "pi0_aloha_sim": ("aloha", "pi0", 50, 48, None, "Transfer cube"),
    "paligemma_diffusion_droid": ("droid", "pi0", 10, 48, None, None),
    "pi05_droid_jointpos_polaris": ("droid", "pi05", 15, 200, JOINTS, None),
    "pi0_droid_jointpos_polaris": ("droid", "pi0", 10, 100, JOINTS, None),
    "pi0_droid_jointpos_100k_polaris": ("droid", "pi0", 10, 100, JOINTS, None),
}
TOKENS_ALONE = (
    "pi0_fast_droid", "pi0_fast_libero", "pi0_fast_libero_low_mem_finetune", "pi0_fast_full_droid_finetune",
    "pi0_fast_droid_jointpos_polaris", "paligemma_binning_droid", "paligemma_fast_droid", "paligemma_vq_droid",
    "paligemma_fast_specialist_droid", "paligemma_binning_droid_jointpos",
)  # fmt: skip


def test_every_public_configuration_has_its_name():
    assert set(PUBLIC) == set(TABLE)
    assert set(WITHOUT) == {*TOKENS_ALONE, "debug", "debug_restore", "debug_pi05"}


@pytest.mark.parametrize("name", TABLE)
def test_public_configurations(name):
    preset, (robot, variant, horizon, length, mask, prompt) = PUBLIC[name], TABLE[name]
    contract = preset.contract()
    assert (contract.robot, preset.variant, contract.action_horizon) == (robot, variant, horizon)
    assert (contract.max_token_len, contract.delta_mask, contract.default_prompt) == (length, mask, prompt)
    assert contract.normalization == ("zscore" if variant == "pi0" else "quantile")
    assert contract.adapt_to_pi == (robot == "aloha")
    # pi05_libero was trained with discrete_state_input=False
    assert contract.state_in_prompt == (variant == "pi05" and name != "pi05_libero")
    assert contract.model_action_dim == (8 if name == "paligemma_diffusion_droid" else 32)
    assert (contract.resize, contract.normalization_epsilon, contract.time_convention) == (
        "pil_pad",
        "openpi",
        "openpi",
    )


def test_a_short_name_has_a_horizon_only_where_all_its_configurations_have_the_same():
    assert {name: PRESETS[name].horizon for name in SHORT} == {
        "droid": None, "droid_joint_position": None, "libero": 10, "aloha": 50,
    }  # fmt: skip
    assert PRESETS["droid"].horizons == "15 (pi05_droid), 16 (pi05_droid_finetune)"
    assert PRESETS["droid"].contract(action_horizon=16) == PUBLIC["pi05_droid_finetune"].contract()


@pytest.mark.parametrize("name", TOKENS_ALONE)
def test_models_of_tokens_alone_are_refused_by_name(name):
    with pytest.raises(ArgumentError, match=f"--contract {name}: .* no flow head"):
        find_preset(name)


def test_others():
    assert find_preset("spot") is None and find_preset("aloha") is PRESETS["aloha"]
    with pytest.raises(ArgumentError, match="made-up data"):
        find_preset("debug_pi05")
    with pytest.raises(ContractError, match="unknown contract fields"):
        PUBLIC["pi05_droid"].contract(horizon=3)
