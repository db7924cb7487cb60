"""The policy contract: presets, JSON round trip, and everything that must be refused."""

import json
from dataclasses import replace

import pytest

from ki_edge.errors import ContractError
from ki_edge.policy import contract as contracts
from ki_edge.policy.contract import Camera, FastContract, PolicyContract, generic, make_mask

PRESETS = {
    "droid": contracts.droid(),
    "droid_joint_position": contracts.droid_joint_position(default_prompt="pick up"),
    "libero": contracts.libero(normalization="zscore"),
    "aloha": contracts.aloha(),
    "generic": generic(
        ["top", Camera("wrist", "hand", required=False)],
        state_dim=5,
        action_dim=4,
        action_horizon=1,
        fast=FastContract(id_offset=900, size=512),
        prompt_format="ki",
        control_hz=20,
        image_size=(42, 84),
    ),
}


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip(name, tmp_path):
    contract = PRESETS[name]
    again = PolicyContract.from_json(json.loads(json.dumps(contract.to_json())))
    assert again == contract
    assert hash(again) == hash(contract)
    contract.save(tmp_path / "contract.json")
    assert PolicyContract.load(tmp_path / "contract.json") == contract


def test_presets():
    droid, position, libero, aloha, plain = PRESETS.values()
    assert (droid.action_horizon, droid.execute, droid.delta_mask, droid.state_in_prompt) == (15, 7, None, True)
    assert (position.action_horizon, position.execute, position.delta_mask) == (16, 8, (True,) * 7 + (False,))
    assert (libero.state_dim, libero.action_dim, libero.action_horizon, libero.state_in_prompt) == (8, 7, 10, False)
    assert aloha.delta_mask == make_mask(6, -1, 6, -1) == ((True,) * 6 + (False,)) * 2
    assert (aloha.action_horizon, aloha.adapt_to_pi, aloha.num_steps) == (50, True, 10)
    assert (plain.execute, plain.state_in_prompt) == (1, True)
    assert plain.cameras == (Camera("top", "top"), Camera("wrist", "hand", required=False))
    for contract in PRESETS.values():
        assert contract.model_action_dim == 32


def test_presets_of_pi0():
    for name, horizon in (("pi0_droid", 10), ("pi0_libero", 50), ("pi0_aloha", 50)):
        contract = getattr(contracts, name)()
        assert (contract.action_horizon, contract.execute, contract.max_token_len) == (horizon, horizon // 2, 48)
        assert (contract.state_in_prompt, contract.normalization_of("actions")) == (False, "zscore")
    assert contracts.pi0_libero().delta_mask == make_mask(6, -1)


def test_actions_normalised_otherwise_than_the_state():
    contract = contracts.droid(action_normalization="none")
    assert (contract.normalization_of("state"), contract.normalization_of("actions")) == ("quantile", "none")
    assert contract.needs_stats and not contracts.droid(normalization="none").needs_stats
    assert contracts.droid(normalization="none", action_normalization="zscore").needs_stats


def test_unknown_preset_field():
    with pytest.raises(ContractError, match="unknown contract fields \\['horizon'\\]"):
        contracts.droid(horizon=3)


@pytest.mark.parametrize("field", [*PRESETS["aloha"].to_json()])
def test_missing_key(field):
    content = PRESETS["aloha"].to_json()
    del content[field]
    with pytest.raises(ContractError, match=f"missing key {field}"):
        PolicyContract.from_json(content)


def test_unknown_key():
    with pytest.raises(ContractError, match=r"contract: unknown key horizon; was it"):
        PolicyContract.from_json({**PRESETS["droid"].to_json(), "horizon": 3})
    content = PRESETS["generic"].to_json()
    content["fast"]["gain"] = 1
    with pytest.raises(ContractError, match=r"contract\.fast: unknown key gain"):
        PolicyContract.from_json(content)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("robot", "ur5", r"contract\.robot: expected one of generic, droid, libero, aloha, got 'ur5'"),
        ("state_dim", 8.0, r"contract\.state_dim: expected int, got 8.0"),
        ("state_dim", True, r"contract\.state_dim: expected int"),
        ("adapt_to_pi", 0, r"contract\.adapt_to_pi: expected bool"),
        ("default_prompt", 3, r"contract\.default_prompt: expected str"),
        ("control_hz", "fast", r"contract\.control_hz: expected float"),
        ("cameras", {}, r"contract\.cameras: expected a list"),
        ("cameras", [3], r"contract\.cameras\[0\]: expected an object"),
        ("cameras", [{"slot": 1, "key": "a", "required": True}], r"contract\.cameras\[0\]\.slot: expected str"),
        ("cameras", [{"slot": "a", "key": "a"}], r"contract\.cameras\[0\]: missing key required"),
        ("image_size", [224], r"contract\.image_size: expected 2 values"),
        ("delta_mask", [1, 0], r"contract\.delta_mask\[0\]: expected bool"),
        ("fast", [], r"contract\.fast: expected an object"),
        ("resize", "crop", r"contract\.resize: expected one of pil_pad"),
    ],
)
def test_wrong_type(field, value, message):
    with pytest.raises(ContractError, match=message):
        PolicyContract.from_json({**PRESETS["aloha"].to_json(), field: value})


@pytest.mark.parametrize("content", [None, [], "x"])
def test_not_an_object(content):
    with pytest.raises(ContractError, match="contract: expected an object"):
        PolicyContract.from_json(content)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"execute": 0}, "execute must be at least 1"),
        ({"execute": 5}, "execute must be at most 4, the action_horizon; got 5"),
        ({"action_dim": 33}, "action_dim 33 exceeds"),
        ({"num_steps": 0}, "num_steps"),
        ({"image_size": (0, 4)}, "image_size"),
        ({"delta_mask": (True,) * 4}, "delta_mask has 4 entries, at most 3"),
        ({"adapt_to_pi": True}, "aloha only"),
        ({"robot": "droid"}, "state_dim of droid is 8"),
        ({"control_hz": 0.0}, "control_hz"),
        ({"fast": FastContract(id_offset=10, size=12)}, "below 0"),
        ({"fast": FastContract(size=0)}, "size and max_tokens"),
        ({"fast": FastContract(folder="../fast")}, "folder '../fast' is not a plain name"),
        ({"fast": FastContract(folder="")}, "folder '' is not a plain name"),
        ({"cameras": ()}, "at least one slot"),
        ({"cameras": (Camera("a", "x"), Camera("a", "y"))}, "same slot twice"),
        ({"cameras": (Camera("a", "x"), Camera("b", "x"))}, "same key twice"),
        ({"cameras": (Camera("a", None),)}, "every slot is empty"),
    ],
)
def test_contradictions(changes, message):
    values = {"cameras": ["top"], "state_dim": 3, "action_dim": 4, "action_horizon": 4, **changes}
    with pytest.raises(ContractError, match=message):
        generic(**values)


def test_aloha_dimensions():
    with pytest.raises(ContractError, match="adapt_to_pi needs action_dim 14"):
        contracts.aloha(action_dim=13, delta_mask=None)
    with pytest.raises(ContractError, match="state_dim of aloha is 14"):
        contracts.aloha(state_dim=13, delta_mask=None)


def test_broken_file(tmp_path):
    with pytest.raises(ContractError, match=r"none\.json"):
        PolicyContract.load(tmp_path / "none.json")
    (tmp_path / "contract.json").write_text("{")
    with pytest.raises(ContractError, match=r"contract\.json"):
        PolicyContract.load(tmp_path / "contract.json")


def test_a_later_field_may_be_left_out():
    """Files of before have no prompt_state_dim, and those that do not need it are written as before."""
    contract = generic(["top"], state_dim=3, action_dim=2, action_horizon=4, pad_state_first=True)
    assert "prompt_state_dim" not in contract.to_json()
    assert PolicyContract.from_json(contract.to_json()).prompt_state_dim is None
    wider = replace(contract, prompt_state_dim=40)
    assert wider.to_json()["prompt_state_dim"] == 40
    assert PolicyContract.from_json(wider.to_json()) == wider
    for wrong, message in ((0, "at least 1"), ("40", "expected int"), (True, "expected int")):
        with pytest.raises(ContractError, match=message):
            PolicyContract.from_json({**contract.to_json(), "prompt_state_dim": wrong})
    with pytest.raises(ContractError, match="is for pad_state_first only"):
        replace(wider, pad_state_first=False)
