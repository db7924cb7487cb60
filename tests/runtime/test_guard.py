"""What never reaches a robot: everything that is no finite float32 of the right shape, from whatever policy."""

import numpy as np
import pytest

from ki_edge.errors import BackendError, RobotError
from ki_edge.policy.contract import generic
from ki_edge.policy.normalize import NormStats
from ki_runtime.control.loop import ControlLoop
from ki_runtime.control.options import LoopOptions
from ki_runtime.policy.guard import Guard, finite_actions
from ki_runtime.robots.base import checked_action

from .fake_robot import DIM, HORIZON, CountingRobot, FormulaPolicy

GOOD = np.zeros((HORIZON, DIM))


def chunk(value, step=4, dim=1, dtype=np.float64):
    """Good actions with one bad value, in a step that a loop with execute 3 would never have sent."""
    actions = GOOD.astype(dtype)
    actions[step, dim] = value
    return actions


BAD = {
    "beyond float32": (chunk(1e300), r"step 4 of the chunk, dimension 1 \(y\): 1e\+300 is too large for float32"),
    "just beyond": (chunk(3.5e38), "too large for float32"),
    "infinite": (chunk(-np.inf), r"the first at step 4 of the chunk, dimension 1 \(y\): -inf is not finite"),
    "NaN": (chunk(np.nan, 0, 0), r"1 of 10 actions .* at step 0 of the chunk, dimension 0 \(x\): nan is not finite"),
    "NaN in float16": (chunk(np.nan, dtype=np.float16), "not finite"),
    "too few": (GOOD[:2], r"shape \(2, 2\), expected \[n, 2\] with at least 3 actions"),
    "none": (GOOD[:0], r"shape \(0, 2\)"),
    "with a batch axis": (GOOD[None], r"shape \(1, 5, 2\), expected \[n, 2\]"),
    "one action": (GOOD[0], r"shape \(2,\), expected \[n, 2\]"),
    "wider": (np.zeros((HORIZON, 4)), r"shape \(5, 4\), expected \[n, 2\]"),
    "objects": (GOOD.astype(object), "an array of object, expected floating point"),
    "truth values": (GOOD.astype(bool), "an array of bool"),
    "complex": (GOOD.astype(complex), "an array of complex128"),
    "text": (np.full((HORIZON, DIM), "1.0"), "an array of <U3"),
    "ragged": ([[0.0, 0.0], [0.0]], "not an array of numbers"),
    "nothing": (None, "an array of object"),
}


class Saying(FormulaPolicy):
    """Answers once as FormulaPolicy does, then with `answer`."""

    contract = generic(
        ["cam"],
        state_dim=2,
        action_dim=DIM,
        action_horizon=HORIZON,
        execute=3,
        model_action_dim=4,
        action_names=("x", "y"),
    )

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def infer(self, observation, **options):
        return super().infer(observation, **options) if not self.asked else self.answer


@pytest.mark.parametrize(("actions", "message"), BAD.values(), ids=BAD)
def test_nothing_of_a_bad_chunk_is_sent(actions, message):
    robot = CountingRobot()
    with pytest.raises(BackendError, match=message) as caught:
        ControlLoop(Saying({"actions": actions, "timing": {}}), robot).run()
    assert "nothing of this chunk is sent to the robot" in str(caught.value)
    assert [event for event, _ in robot.log if event == "act"] == ["act"] * 3
    assert robot.closed == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"action": GOOD}, r"the policy answered \['action'\], expected a mapping with 'actions'"),
        (GOOD, "answered ndarray"),
    ],
)
def test_an_answer_without_actions(answer, message):
    with pytest.raises(BackendError, match=message):
        ControlLoop(Saying(answer), CountingRobot()).run()


@pytest.mark.parametrize("actions", [GOOD.tolist(), GOOD.astype(np.float16), GOOD.astype(int), chunk(3.4e38)])
def test_other_numbers_are_taken(actions):
    robot = CountingRobot()
    ControlLoop(Saying({"actions": actions}), robot, LoopOptions(max_steps=5)).run()  # without a timing, too
    assert [event for event, _ in robot.log].count("act") == 5


def test_what_is_admitted_is_what_is_sent():
    admitted = Guard(Saying.contract, 3).admit({"actions": chunk(0.1, 2, 0)})
    assert admitted.dtype == np.float32 and admitted[2, 0] == np.float32(0.1)


def test_names_are_said_where_they_are_known():
    with pytest.raises(BackendError, match=r"dimension 1: nan"):
        finite_actions(chunk(np.nan))


@pytest.mark.parametrize("action", [[0, 1e300], [np.nan, 0], [0, -np.inf]])
def test_a_robot_refuses_what_is_not_finite_in_float32(action):
    with pytest.raises(RobotError, match=r"arm: the action .* is not finite in float32; it was not applied"):
        checked_action(action, 2, "arm")
    with pytest.raises(RobotError, match="an array of object, expected numbers"):
        checked_action([None, 0], 2, "arm")
    assert checked_action([1, 2], 2, "arm").dtype == np.float32


def test_the_policy_itself_refuses_actions_beyond_float32(fake_policy_parts):
    """For those who call `infer` and drive their robot themselves."""
    policy, observation = fake_policy_parts
    with pytest.raises(BackendError, match="is too large for float32"):
        policy.infer(observation, seed=0)


@pytest.fixture
def fake_policy_parts(make_bundle, fake_sampler, tokenizer_model):
    """(Policy whose statistics map ordinary model actions beyond float32, an observation)."""
    from ki_edge.policy.prompt import PromptTokenizer
    from ki_runtime.policy.assets import PolicyAssets
    from ki_runtime.policy.policy import Policy

    contract = generic(["cam"], state_dim=2, action_dim=2, action_horizon=5, model_action_dim=6, image_size=(4, 4))
    near, wide = (NormStats(q01=np.zeros(2), q99=np.ones(2)) for _ in range(2))
    object.__setattr__(wide, "q99", np.full(2, 1e300))  # which no file can hold
    sampler, _ = fake_sampler()
    tokenizer = PromptTokenizer(tokenizer_model, contract.prompt_format, contract.max_token_len)
    policy = Policy(sampler, PolicyAssets(contract, tokenizer, {"state": near, "actions": wide}, None))
    return policy, {"images": {"cam": np.zeros((4, 4, 3), np.uint8)}, "state": [0.5, 0.5], "prompt": "open the drawer"}
