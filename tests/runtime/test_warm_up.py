"""After a warm-up the first inference allocates nothing, compiles nothing and records nothing."""

import numpy as np
import pytest

from ki_edge.errors import ArgumentError, BackendError, PromptError
from ki_edge.policy.contract import Camera, FastContract, generic
from ki_runtime.backends.session import Bucket
from ki_runtime.policy.assets import read_assets
from ki_runtime.policy.policy import Policy
from ki_runtime.policy.warming import likely_cameras, prompt_lengths

from .conftest import CONFIG, FAST_COUNT, FAST_FIRST
from .gpu_machine import Machine

PROMPT = "pick up the red cube"
COSTLY = ("cudaMalloc", "cudaMallocHost", "cudaStreamBeginCapture", "cudaGraphInstantiate")


def contract(**changes):
    cameras = [Camera("base", "front"), Camera("wrist", "wrist", required=False), Camera("other", None)]
    fields = {"state_dim": 4, "action_dim": 3, "action_horizon": CONFIG.action_horizon, "image_size": (4, 4)}
    more = {"model_action_dim": CONFIG.action_dim, "normalization": "none", "default_prompt": PROMPT}
    return generic(changes.pop("cameras", cameras), **{**fields, **more, **changes})


@pytest.fixture
def make_policy(make_bundle, tokenizer_model):
    """make_policy(name="bundle", **contract changes) -> (Policy, the machine that it runs on)."""

    def make(name="bundle", **changes):
        content = contract(**changes).to_json()
        machine = Machine(make_bundle(name, assets={"assets/tokenizer.model": tokenizer_model}, contract=content))
        return Policy(machine.sampler(), read_assets(machine.bundle)), machine

    return make


def observation(state=0.0, cameras=("front", "wrist"), **more):
    images = {name: np.full((4, 4, 3), 90, np.uint8) for name in cameras}
    return {"images": images, "state": np.full(4, state), **more}


def costs(machine, run):
    """What `run` takes of the GPU besides running."""
    machine.cuda.calls.clear()
    before = len(machine.trt.contexts)
    run()
    return sum(map(machine.cuda.calls.count, COSTLY)) + len(machine.trt.contexts) - before


@pytest.mark.parametrize("num_steps", [None, 3])
def test_the_first_inference_costs_nothing(make_policy, num_steps):
    policy, machine = make_policy()
    prepared = policy.warm_up(num_steps=num_steps)
    for state in (0.0, -1.0, 0.3, 1.0):
        for cameras in (("front",), ("front", "wrist")):
            given = observation(state, cameras)
            assert costs(machine, lambda given=given: policy.infer(given, num_steps=num_steps)) == 0
    assert prepared.cameras == (2, 1) and prepared.num_steps == (num_steps or 10) and not prepared.fast
    assert prepared.milliseconds > 0
    fed = {call["prompt_tokens"].shape[1] for call in machine.engine.of("prefix")}
    assert fed == set(map(Bucket(16).fit, prepared.prompt_tokens))


def test_without_it_the_first_inference_pays(make_policy):
    policy, machine = make_policy()
    assert costs(machine, lambda: policy.infer(observation())) > 10
    assert costs(machine, lambda: policy.infer(observation())) == 0


def test_actions_do_not_depend_on_it(make_policy):
    warm, cold = make_policy()[0], make_policy("cold")[0]
    warm.warm_up()
    for seed in range(2):
        ours, theirs = (policy.infer(observation(0.2), seed=seed)["actions"] for policy in (warm, cold))
        np.testing.assert_array_equal(ours, theirs)


def test_fast_is_prepared_on_request(make_policy):
    fast = FastContract(id_offset=FAST_FIRST + FAST_COUNT - 1, size=FAST_COUNT, max_tokens=12)
    policy, machine = make_policy(fast=fast)
    assert costs(machine, lambda: policy.warm_up()) and "fast_decode" not in machine.trt.loaded
    assert policy.warm_up(fast=True).fast
    assert costs(machine, lambda: policy.infer_fast(observation())) == 0
    plain, _ = make_policy("plain")
    with pytest.raises(ArgumentError, match="no FAST head"):
        plain.warm_up(fast=True)


def test_errors_are_those_of_an_inference(make_policy):
    policy, machine = make_policy()
    with pytest.raises(PromptError):
        policy.warm_up(prompt="cube " * 500)
    with pytest.raises(ArgumentError, match="steps"):
        policy.warm_up(num_steps=0)
    machine.engine.poison = "denoise"
    with pytest.raises(BackendError, match="NaN or infinite"):
        policy.warm_up()


def test_the_lengths(tokenizer_model):
    tokens = [np.zeros(count, np.int32) for count in (30, 31, 34)]
    assert prompt_lengths(tokens, Bucket(16), 200, sure=True) == (48, 32)
    assert prompt_lengths(tokens, Bucket(16), 200, sure=False) == (64, 48, 32, 16)
    assert prompt_lengths(tokens, Bucket(16), 40, sure=False) == (40, 32, 16)  # no prompt is longer
    assert prompt_lengths(tokens, Bucket(), 200, sure=False) == (34,)


def test_the_cameras():
    assert [mask.tolist() for mask in likely_cameras(contract())] == [[True, True, False], [True, False, False]]
    (only,) = likely_cameras(generic(["a", "b"], state_dim=2, action_dim=2, action_horizon=5))
    assert only.tolist()[:2] == [True, True]


def test_a_long_state_and_cameras_of_which_none_must_be_there(make_policy):
    """As LeRobot's policies are: 40 numbers in a prompt that is padded to fewer, and every camera may be absent."""
    long = {"state_dim": 40, "pad_state_first": True, "prompt_format": "pi05", "max_token_len": 300}
    cameras = [Camera("base", "front", required=False), Camera("wrist", "wrist", required=False)]
    policy, _ = make_policy(cameras=tuple(cameras), **long)
    assert policy.warm_up().cameras == (2,)
