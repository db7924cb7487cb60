"""Profiles: what the runtime can ask for is within them, and nothing that it cannot is."""

import pytest

from ki_edge import graphs
from ki_edge.config import PI05
from ki_edge.errors import ArgumentError, BackendError
from ki_edge.policy.contract import FastContract, droid, generic, pi0_aloha
from ki_runtime.trt.profiles import FORCED, PROMPT_BUCKET, Profile, bucket, profiles


@pytest.fixture
def manifest(make_bundle):
    """manifest(contract=None, variant="pi05") -> manifest of a full-size policy."""

    def make(contract=None, variant="pi05"):
        model = {**PI05.to_dict(), "variant": variant}
        return make_bundle(model=model, contract=None if contract is None else contract.to_json()).manifest

    return make


def test_droid_by_hand(manifest) -> None:
    found = {graph: profile.shapes for graph, (profile,) in profiles(manifest(droid())).items()}
    tokens, masks = ((1, 1), (1, 64), (1, 208)), ((1, 1), (1, 2), (1, 3))
    images = ((1, 1, 224, 224, 3), (1, 2, 224, 224, 3), (1, 3, 224, 224, 3))
    assert found["prefix"] == {
        "images": images,
        "camera_mask": masks,
        "prompt_tokens": tokens,
        "prompt_mask": tokens,
    }
    kv = ((18, 1, 1, 257, 256), (18, 1, 1, 576, 256), (18, 1, 1, 976, 256))
    assert found["denoise"] == {
        "x_t": ((1, 50, 32),) * 3,
        "prefix_k": kv,
        "prefix_v": kv,
        "prefix_mask": ((1, 257), (1, 576), (1, 976)),
    }
    assert found["fast_decode"]["tokens"] == ((1, 1), (1, 1), (1, 1 + FORCED))
    assert found["fast_decode"]["cache_mask"] == ((1, 258), (1, 576 + 256 + FORCED), (1, 976 + 256 + FORCED))


def test_without_a_contract_three_cameras_and_200_tokens(manifest) -> None:
    (prefix,) = profiles(manifest())["prefix"]
    assert prefix["camera_mask"] == ((1, 1), (1, 3), (1, 3))
    assert prefix["prompt_mask"][2] == (1, 208)


def test_every_observation_of_the_contract_is_accepted_once_padded(manifest) -> None:
    contract = generic(
        ["a", "b"],
        state_dim=2,
        action_dim=2,
        action_horizon=50,
        max_token_len=50,
        fast=FastContract(id_offset=600, size=43, max_tokens=30),
    )
    found = {graph: profile for graph, (profile,) in profiles(manifest(contract)).items()}
    for cameras in (1, 2):
        for length in range(1, 51):
            tokens, prefix = bucket(length), cameras * 256 + bucket(length)
            assert found["prefix"].accepts({"camera_mask": (1, cameras), "prompt_tokens": (1, tokens)})
            assert found["denoise"].accepts({"prefix_mask": (1, prefix), "prefix_k": (18, 1, 1, prefix, 256)})
            for forced in (0, FORCED):
                cache = prefix + 30 + forced
                assert found["fast_decode"].accepts({"cache_mask": (1, cache), "tokens": (1, 1 + forced)})
    assert not found["prefix"].accepts({"camera_mask": (1, 3)})
    assert not found["prefix"].accepts({"prompt_tokens": (1, 65)})
    assert not found["prefix"].accepts({"prompt_tokens": (2, 16)})
    assert not found["fast_decode"].accepts({"tokens": (1, 2 + FORCED)})


@pytest.mark.parametrize(("tokens", "padded"), [(1, 16), (16, 16), (17, 32), (200, 208)])
def test_prompts_come_in_buckets(tokens, padded) -> None:
    assert bucket(tokens) == padded and padded % PROMPT_BUCKET == 0


def test_the_state_of_a_pi0_is_an_input(manifest) -> None:
    found = profiles(manifest(pi0_aloha(), "pi0"))
    assert found["denoise"][0]["state"] == ((1, 32),) * 3
    assert found["prefix"][0]["prompt_tokens"][2] == (1, 48)


def test_profiles_name_exactly_the_dynamic_inputs(manifest) -> None:
    made = manifest(droid())
    for spec in graphs.specs(made.config, fast=True):
        dynamic = [t.name for t in spec.inputs if any(d in ("B", "N", "T", "S", "C", "Q") for d in t.dims)]
        assert list(profiles(made)[spec.name][0]) == dynamic


def test_batch(manifest) -> None:
    made = manifest(droid())
    (prefix,) = profiles(made, batch=4)["prefix"]
    assert prefix["camera_mask"] == ((1, 1), (4, 2), (4, 3))
    with pytest.raises(ArgumentError, match="batch 0: expected at least 1"):
        profiles(made, batch=0)


def test_covers() -> None:
    wide, narrow = Profile({"x": ((1,), (2,), (9,))}), Profile({"x": ((2,), (3,), (9,))})
    assert wide.covers(narrow) and wide.covers(wide) and not narrow.covers(wide)
    assert not Profile({"x": ((2,), (3,), (8,))}).covers(narrow)
    assert not wide.covers(Profile({"y": ((2,), (3,), (9,))}))
    assert not wide.covers(Profile({"x": ((2, 1), (3, 1), (9, 1))}))


def test_json_there_and_back(manifest) -> None:
    for (profile,) in profiles(manifest(droid())).values():
        assert Profile.from_json(profile.to_json()) == profile


@pytest.mark.parametrize("bad", [None, [], {"x": [[1], [2]]}, {"x": [[1], [2], [3, 4]]}, {"x": [["a"], [2], [3]]}])
def test_bad_json(bad) -> None:
    with pytest.raises(BackendError, match="not a profile"):
        Profile.from_json(bad)
