"""FAST tokens over a fake engine: what the cached decoding gives, where it stops, and what is refused."""

import numpy as np
import pytest

from ki_edge.errors import ArgumentError, BackendError
from ki_edge.policy.contract import FastContract, generic
from ki_edge.policy.prompt import PromptTokenizer
from ki_runtime.policy.decode import choices_of

from .conftest import BAR, CONFIG, EOS, FAST_COUNT, FAST_FIRST

P = CONFIG.vision.patches


def expected_tokens(inputs, row, allowed, max_tokens, forced=()):
    """The fake engine's rule over the whole sequence, no cache: oracle of the cached decoding."""
    images, camera_mask, tokens, mask = (part[row] for part in inputs)
    pixels = images.astype(np.float32).mean(axis=(1, 2, 3)) * camera_mask
    seen = P * float(pixels.sum()) + float(tokens[mask].sum()) + sum(forced)
    out = []
    while len(out) < max_tokens and EOS not in out:
        wanted = 600 + round(seen) % 43
        out.append(min(allowed, key=lambda i: (abs(i - wanted), allowed.index(i))))
        seen += out[-1]
    return out + [EOS] * (max_tokens - len(out))


ALLOWED = [*range(FAST_FIRST, FAST_FIRST + FAST_COUNT), BAR, EOS]


@pytest.mark.parametrize("forced", [(), (50,), (50, 51, 52)])
@pytest.mark.parametrize("max_tokens", [1, 2, 9])
def test_decoding_equals_the_uncached_rule(fake_sampler, batch, forced, max_tokens):
    sampler, engine = fake_sampler()
    inputs = batch([[True, False]], [[2, 30, 40]])
    tokens = sampler.sample_fast_tokens(*inputs, max_tokens=max_tokens, forced=forced)
    assert tokens.dtype == np.int64
    assert tokens.tolist() == [expected_tokens(inputs, 0, ALLOWED, max_tokens, forced)]
    first, *later = engine.of("fast_decode")
    assert first["tokens"].tolist() == [[40, *forced]]  # the last prompt token again
    assert first["positions"][0, 0] == P + 2
    assert not first["cache_mask"][0, P + 2] and first["cache_mask"].sum() == P + 2
    assert [call["tokens"].shape for call in later] == [(1, 1)] * (max_tokens - 1)


def test_rows_of_different_lengths(fake_sampler, batch):
    sampler, _ = fake_sampler()
    inputs = batch([[True, False], [False, True], [True, True]], [[2, 30], [2, 30, 40, 50, 60], [2]])
    tokens = sampler.sample_fast_tokens(*inputs, max_tokens=7, forced=(11, 12))
    assert tokens.tolist() == [expected_tokens(inputs, row, ALLOWED, 7, (11, 12)) for row in range(3)]


def test_rows_stop_at_eos(fake_sampler, batch):
    sampler, engine = fake_sampler()
    inputs = batch([[True], [True]], [[2, 30], [2, 40]])
    engine.fast_decode = stop_after(engine, {0: 2, 1: 4})
    tokens = sampler.sample_fast_tokens(*inputs, max_tokens=50)
    assert tokens.shape == (2, 4)
    assert tokens[0, 1:].tolist() == [EOS] * 3 and tokens[0, 0] != EOS
    assert tokens[1, 3] == EOS and EOS not in tokens[1, :3]


def stop_after(engine, ends):
    """The engine's rule, but row r says EOS as its ends[r]-th token."""
    rule, count = engine.fast_decode, [0]

    def fast_decode(**feeds):
        count[0] += 1
        outputs = rule(**feeds)
        for row, end in ends.items():
            outputs["logits"][row, engine.column_ids.index(EOS)] = 1.0 if count[0] == end else -1e9
        return outputs

    return fast_decode


def full_vocabulary(make_bundle, **changes):
    return make_bundle(decode_vocabulary={"first": 0, "count": CONFIG.vocab_size, "extra": []}, **changes)


def test_unconstrained_needs_the_full_vocabulary(fake_sampler, make_bundle, batch):
    inputs = batch([[True]], [[2, 30]])
    with pytest.raises(ArgumentError, match="export with --full-vocabulary"):
        fake_sampler()[0].sample_fast_tokens(*inputs, max_tokens=3, constrained=False)
    sampler, _ = fake_sampler(full_vocabulary(make_bundle, name="full"))
    tokens = sampler.sample_fast_tokens(*inputs, max_tokens=3, constrained=False)
    assert tokens.tolist() == [expected_tokens(inputs, 0, list(range(CONFIG.vocab_size)), 3)]


def test_constrained_needs_to_know_the_fast_ids(fake_sampler, make_bundle, batch, tokenizer_model):
    inputs = batch([[True]], [[2, 30]])
    sampler, _ = fake_sampler(full_vocabulary(make_bundle, name="bare"))
    with pytest.raises(ArgumentError, match="pass constrained=False"):
        sampler.sample_fast_tokens(*inputs, max_tokens=3)
    contract = generic(["cam"], state_dim=2, action_dim=2, action_horizon=5, fast=FastContract(id_offset=630, size=20))
    assets = {"assets/tokenizer.model": tokenizer_model}
    sampler, _ = fake_sampler(full_vocabulary(make_bundle, name="full", contract=contract.to_json(), assets=assets))
    tokens = sampler.sample_fast_tokens(*inputs, max_tokens=6)
    ends = PromptTokenizer(tokenizer_model, "pi05", 200).end_ids
    assert set(choices_of(sampler.bundle, True).ids.tolist()) == {*range(611, 631), *ends, EOS}
    allowed = [*range(611, 631), *ends, EOS]
    assert tokens.tolist() == [expected_tokens(inputs, 0, allowed, 6)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"max_tokens": 1.5}, "max_tokens 1.5"),
        ({"max_tokens": 3, "forced": (1000,)}, "forced id 1000"),
        ({"max_tokens": 3, "forced": ("a",)}, "forced: expected integers, found 'a'"),
    ],
)
def test_decoding_arguments(fake_sampler, batch, arguments, message):
    sampler, engine = fake_sampler()
    with pytest.raises(ArgumentError, match=message):
        sampler.sample_fast_tokens(*batch([[True]], [[2]]), **arguments)
    assert not engine.calls


def test_nan_logits_are_refused_and_do_not_stay_in_the_cache(fake_sampler, batch):
    sampler, engine = fake_sampler()
    inputs = batch([[True]], [[2, 30]])
    engine.poison = "fast_decode"
    with pytest.raises(BackendError, match="not finite"):
        sampler.sample_fast_tokens(*inputs, max_tokens=5)
    engine.poison = None
    assert sampler.sample_fast_tokens(*inputs, max_tokens=5).tolist() == [expected_tokens(inputs, 0, ALLOWED, 5)]
