"""A contract of wrong types or absurd sizes is refused by the field's name, however it is constructed."""

import math
from dataclasses import replace

import numpy as np
import pytest

from ki_edge.errors import ContractError
from ki_edge.policy.contract import Camera, FastContract, PolicyContract, generic

SOUND = generic(
    ["front"], state_dim=3, action_dim=3, action_horizon=4, fast=FastContract(), default_prompt="go",
    delta_mask=(True, False), action_names=("x", "y", "z"), control_hz=10,
)  # fmt: skip


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("robot", ["fetch", 3, None, ["aloha"], {}]),
        ("cameras", [None, "front", (), [Camera("a", 3)], ("front",), (Camera("a\x1b", "a"),)]),
        ("cameras", [(Camera("a" * 501, "a"),)]),
        ("cameras", [tuple(Camera(f"c{i}", f"c{i}") for i in range(65))]),
        ("cameras", [(Camera("a", "a", required=1),)]),
        ("state_dim", ["3", 3.0, True, None, np.int64(3), 4097, 10**30, -1]),
        ("action_horizon", [10**18, 0, math.inf]),
        ("image_size", [224, (224,), (224, 224, 3), ("224", 224), (224, 10**9), (224.0, 224), None]),
        ("num_steps", [1001, "10", None]),
        ("max_token_len", [1 << 17, 2.5]),
        ("default_prompt", [3, b"go", "x" * 10_001, "a\x1b[2J", "\ud800"]),
        ("normalization", ["minmax", None, 1, []]),
        ("control_hz", [math.nan, math.inf, 1e9, "25", -1.0, 0]),
        ("delta_mask", [True, (1, 0), ("True",), (True,) * 5000]),
        ("adapt_to_pi", [0, None, "no"]),
        ("fast", [{}, 3, FastContract(size=1 << 30), FastContract(max_tokens=10**9), FastContract(folder=3)]),
        ("fast", [FastContract(folder="a\n"), FastContract(id_offset="257023"), FastContract(size=True)]),
        ("action_names", ["xyz", (1, 2, 3), ("a", "b", "c\x9b")]),
    ],
)  # fmt: skip
def test_every_field(field: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(ContractError, match=rf"policy contract: .*{field}") as refused:
            replace(SOUND, **{field: value})  # type: ignore[arg-type]
        assert len(str(refused.value)) < 400
        assert str(refused.value).isprintable()


def test_texts_of_any_language_are_prompts() -> None:
    for prompt in ("می\u200cخواهم", "stop ✋🏽\u200d", "first\nsecond"):
        assert replace(SOUND, default_prompt=prompt).default_prompt == prompt
    assert PolicyContract.from_json(SOUND.to_json()) == replace(SOUND, control_hz=10.0)
