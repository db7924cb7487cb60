"""Every argument of the public Python API, replaced by every kind of wrong value: a KiEdgeError or a result, no other.

Warnings are errors here, so numpy's count as failures too. Huge arrays are broadcast: they take no memory themselves.
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ki_edge.errors import ArgumentError, KiEdgeError, ObservationError
from ki_edge.policy.contract import Camera, FastContract, generic
from ki_edge.policy.fast import FastIds
from ki_edge.policy.fast_fitting import fit_codec
from ki_edge.policy.normalize import NormStats, compute_stats, normalize, unnormalize
from ki_edge.policy.prompt import PromptTokenizer, digitize_state, pad
from ki_runtime.backends.backend import SessionOptions
from ki_runtime.control.loop import LoopOptions
from ki_runtime.policy.policy import Policy
from ki_runtime.policy.sampler import Sampler

from .conftest import CONFIG
from .test_policy import assets, codec, make_policy  # noqa: F401


class Strange:
    """Says that it is an array and is none."""

    def __array__(self, *arguments, **options):
        raise RuntimeError("no array today\x1b[2J")

    def __repr__(self):
        return "\x1b[2J" + "x" * 100_000


def huge(dtype, *shape):
    return np.broadcast_to(np.zeros((), dtype), shape)


HOSTILE = [
    None, True, 0, -1, 1, 1.5, 10**6, 10**30, -(10**30), float("nan"), float("inf"), 1j, "x", "", "\ud800", "a\0b",
    b"x", "x" * 200_000, [], [[]], {}, (), [1, 2.5], [[1], [2, 3]], ["a"], [None], [10**30], [object()], {"a": 1},
    {1: 2}, object, Strange(), [Strange()], iter([1]), range(3), np.float32(2), np.int64(-5), np.bool_(True),
    np.array(3), np.zeros(0), np.zeros((0, 0)), np.full(3, np.nan), np.full((2, 3), np.inf), np.array(["a"]),
    np.array([{}], object), np.array([1 + 2j]), np.array(["2020"], "M8[Y]"), np.zeros(2, [("a", "f4")]),
    np.array([1e300]), np.uint64([2**64 - 1]), np.zeros((1,) * 20), huge(np.uint8, 10**6, 2, 4, 4, 3),
    huge(np.uint8, 1, 10**6, 4, 4, 3), huge(np.bool_, 10**6, 2), huge(np.float32, 10**6, 5, 6),
    huge(np.int32, 10**6, 12), huge(np.float64, 10**6, 10**6), huge(np.uint8, 10**6, 10**6, 3),
    huge(np.int32, 1, 10**7), huge(np.bool_, 1, 10**7),
]  # fmt: skip


SMALL = [value for value in HOSTILE if not isinstance(value, np.ndarray) or value.size < 1000]


def survives(call, good, hostile=HOSTILE):
    """Each argument hostile in turn; the good call works before and after all of it."""
    call(**good)
    for name in good:
        for value in hostile:
            try:
                call(**{**good, name: value})
            except KiEdgeError as error:
                assert len(str(error)) < 3000, name
            except Exception as error:
                given = f"{name}={type(value).__name__} {str(value)[:60]!r}"
                raise AssertionError(f"{given} gives {error!r:.300}") from error
    call(**good)


@pytest.fixture
def inputs(batch):
    names = ("images", "camera_mask", "prompt_tokens", "prompt_mask")
    return dict(zip(names, batch([[True, True]], [[2, 3, 4]]), strict=True))


def test_sampler(fake_sampler, inputs):
    sampler, _ = fake_sampler()
    seeded = {**inputs, "seed": 3, "num_steps": 2}
    noise = np.zeros((1, CONFIG.action_horizon, CONFIG.action_dim), np.float32)
    survives(sampler.sample_actions, seeded)
    survives(sampler.sample_actions, {**inputs, "noise": noise, "state": None})
    survives(sampler.trace, seeded)
    survives(sampler.sample_fast_tokens, {**inputs, "max_tokens": 3, "forced": (5,), "constrained": True})


def test_policy(make_policy):  # noqa: F811
    policy, _ = make_policy()
    picture = np.zeros((8, 6, 3), np.uint8)

    def infer(prompt, state, front, wrist, images=None, seed=1, num_steps=2):
        images = {"front": front, "wrist": wrist} if images is None else images
        return policy.infer({"images": images, "state": state, "prompt": prompt}, seed=seed, num_steps=num_steps)

    good = {"prompt": "go", "state": [0.0, 1.0], "front": picture, "wrist": None, "images": None, "seed": 1}
    survives(infer, good)
    observation = {"images": {"front": picture}, "state": [0.0, 1.0], "prompt": "go"}
    noise = np.zeros((CONFIG.action_horizon, CONFIG.action_dim), np.float32)
    survives(policy.infer, {"observation": observation, "noise": noise, "num_steps": 2})
    survives(policy.infer_fast, {"observation": observation})


def test_opening(make_bundle):
    bundle = make_bundle()

    for call in (Sampler.open, Policy.load):
        good = {"bundle": bundle.path, "backend": "ort", "threads": 1}
        for name in good:
            for value in HOSTILE:
                with pytest.raises((KiEdgeError, ArgumentError)):
                    call(**{**good, name: value} if value is not None or name != "threads" else {**good, "threads": 0})


def test_options():
    good = {
        "episodes": 1,
        "seed": 0,
        "execute": 1,
        "num_steps": 1,
        "prompt": "x",
        "max_steps": 1,
        "rate": 1,
        "max_seconds": 1,
    }
    survives(LoopOptions, good)
    survives(SessionOptions, {"threads": 1})


def test_fast(codec, tokenizer_model):  # noqa: F811
    survives(codec.encode, {"actions": np.zeros((4, 3))})
    survives(codec.encode, {"actions": np.zeros((4, 3)), "lossy": True})
    survives(codec.decode, {"ids": codec.encode(np.zeros((4, 3))), "horizon": 4, "action_dim": 3})

    def fit(chunks, **options):
        return fit_codec(chunks, **options)

    survives(fit, {"chunks": np.zeros((2, 4, 3)), "scale": 10.0, "vocab_size": 300, "margin": 1}, SMALL)
    survives(FastIds, {"offset": 900, "size": 10})
    ids = FastIds(900, 10)
    survives(ids.to_model, {"fast_ids": [1]})
    tokenizer = PromptTokenizer(tokenizer_model, "ki", 99)
    survives(lambda model_ids: ids.parse(model_ids, tokenizer), {"model_ids": [899]})


def test_prompts(tokenizer_model):
    survives(PromptTokenizer, {"model": tokenizer_model, "format": "ki", "max_token_len": 99})
    tokenizer = PromptTokenizer(tokenizer_model, "pi05", 99)
    survives(tokenizer.encode, {"prompt": "go", "state": [0.5]})
    survives(tokenizer.decode, {"ids": [5, 6]})
    survives(digitize_state, {"state": [0.5]}, SMALL)
    survives(pad, {"ids": [1], "length": 3, "pad_id": 0})


def test_normalisation():
    stats = NormStats(mean=[0.0], std=[1.0], q01=[-1.0], q99=[1.0])
    survives(NormStats, {"mean": [0.0], "std": [1.0], "q01": [0.0], "q99": [1.0]}, SMALL)
    survives(compute_stats, {"x": np.zeros((3, 2))}, SMALL)  # data may be huge
    for call, name in ((normalize, "x"), (unnormalize, "y")):
        survives(call, {name: np.zeros(1), "stats": stats, "kind": "quantile", "epsilon": "openpi"}, SMALL)
        survives(call, {name: np.zeros(1), "stats": stats, "kind": "zscore", "epsilon": "lerobot"}, SMALL)


def test_contracts():
    front = (Camera("front", "front"),)
    good = {"cameras": front, "state_dim": 2, "action_dim": 2, "action_horizon": 4}
    survives(generic, good)
    more = {"image_size": (8, 8), "num_steps": 3, "delta_mask": (True,), "fast": FastContract(), "control_hz": 5.0}
    survives(lambda **changes: generic(["front"], state_dim=2, action_dim=2, action_horizon=4, **changes), more)


ANYTHING = st.recursive(
    st.one_of(
        *(st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers()),
        *(st.text(max_size=5), st.binary(max_size=5)),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)
@given(observation=st.dictionaries(st.sampled_from(["images", "state", "prompt", "x"]), ANYTHING) | ANYTHING)
def test_any_observation(make_policy_once, observation):
    with pytest.raises((ObservationError, ArgumentError)):
        make_policy_once.infer(observation)


@pytest.fixture
def make_policy_once(make_policy):  # noqa: F811
    return make_policy("once")[0]
