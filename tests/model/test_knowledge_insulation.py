"""What knowledge insulation promises: one prefix for training and inference, and FAST tokens that become actions."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ki_edge.model import Observation, Pi05, loss, sampling
from ki_edge.policy.fast import FastCodec, FastIds
from ki_edge.policy.prompt import PromptTokenizer

SAME = 1e-6  # of the largest value: only the blocking of a longer matrix product may differ


@torch.no_grad()
@pytest.mark.parametrize("name", ["ki", "small"])
def test_prefix_is_the_same_with_and_without_fast_tokens(golden, small_model, observe, name):
    """Vectors, keys and values of every valid prefix token: in the training pass, and as inference caches them."""
    if name == "ki":
        model, observation = golden("ki").model, golden("ki").observation
    else:
        model, observation = small_model, observe([[True, True], [False, True], [True, False]], [7, 2, 4], [3, 8, 5])
    fields = (observation.images, observation.camera_mask, observation.prompt_tokens, observation.prompt_mask)
    vectors, _, _ = loss.embed_fast_sequence(model, observation)
    expected, mask = model.embed_prefix(*fields)
    torch.testing.assert_close(vectors[:, : mask.shape[1]], expected, rtol=0, atol=SAME)
    _, cache, training_mask = loss.joint_backbone(model, observation)
    keys, values, inference_mask = sampling.prefix(model, Observation(*fields))
    assert torch.equal(training_mask, inference_mask)
    seen = mask[:, None, :, None]
    for layer, (k, v) in enumerate(cache):
        for training, inference in ((k, keys[layer]), (v, values[layer])):
            largest = float((inference * seen).abs().max())
            torch.testing.assert_close(training * seen, inference * seen, rtol=0, atol=SAME * max(1.0, largest))


@torch.no_grad()
def test_what_the_expert_sees_does_not_depend_on_the_answer(golden):
    """Other FAST tokens, or none: the same flow loss. The answer cannot leak into the actions."""
    case = golden("ki")
    arguments = [torch.from_numpy(case.inputs[name]) for name in ("noise", "time")]
    actions = torch.from_numpy(case.inputs["actions"])
    other = replace(case.observation, fast_tokens=case.observation.fast_tokens.flip(0).flip(1))
    flows = [
        case.model.compute_loss(observation, actions, noise=arguments[0], time=arguments[1]).flow
        for observation in (case.observation, other)
    ]
    torch.testing.assert_close(flows[0], flows[1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_fast_tokens_do_not_see_the_future(small_model, observe):
    """A changed token changes the logits after it and none before."""
    observation = observe([[True, True]], [5], [6])
    changed = observation.fast_tokens.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 96
    before, after = (
        small_model.fast_logits(each)[0] for each in (observation, replace(observation, fast_tokens=changed))
    )
    torch.testing.assert_close(before[:4], after[:4], rtol=0, atol=SAME)  # row 3 predicts token 3
    assert (before[4:] - after[4:]).abs().amax(dim=1).min() > 1e-3


@pytest.fixture
def tokens_of(data, tokenizer_model):
    codec = FastCodec.load(data / "fast")
    tokenizer = PromptTokenizer(tokenizer_model, "ki", 64)
    return codec, tokenizer, FastIds(offset=tokenizer.vocab_size + codec.vocab_size - 1, size=codec.vocab_size)


def test_trained_fast_tokens_decode_to_the_actions(small_model, observe, tokens_of):
    """The backbone learns two chunks by heart; greedy decoding gives them back as actions, each for its prompt."""
    codec, tokenizer, ids = tokens_of
    time = np.linspace(0.0, 1.0, 16)[:, None]
    chunks = [0.8 * np.cos(3.0 * time + np.arange(8)), np.tile(0.5 - time, 8)]
    postfixes = [ids.postfix(codec.encode(chunk), tokenizer) for chunk in chunks]
    prompts = [tokenizer.encode("pick up the red cube", [0.1]), tokenizer.encode("open the drawer", [-0.4])]

    def rows(sequences):
        mask = torch.arange(max(map(len, sequences))) < torch.tensor([[len(row)] for row in sequences])
        tokens = torch.zeros(mask.shape, dtype=torch.long)
        tokens[mask] = torch.from_numpy(np.concatenate(sequences)).long()
        return tokens, mask

    config = replace(small_model.config, vocab_size=ids.offset + 1)
    torch.manual_seed(0)
    model = Pi05(config)
    with torch.no_grad():
        model.backbone.embed_tokens.weight.mul_(0.2)
    pictures = observe([[True], [True]], [1, 1])
    observation = Observation(pictures.images, pictures.camera_mask, *rows(prompts), *rows(postfixes))
    optimizer = torch.optim.Adam((p for _, p in model.backbone_parameters()), lr=5e-3)
    for _ in range(80):
        optimizer.zero_grad()
        model.token_loss(observation).mean().backward()
        optimizer.step()
    model.eval()
    model.eos_id = tokenizer.eos_id
    model.decode_ids = (*ids.to_model(range(ids.size)).tolist(), *tokenizer.end_ids, tokenizer.eos_id)
    sampled = model.sample_fast_tokens(observation, max_tokens=60, forced=tokenizer.action_ids)
    for row, chunk, postfix in zip(sampled, chunks, postfixes, strict=True):
        assert [*tokenizer.action_ids, *row.tolist()][: len(postfix)] == postfix.tolist()
        parsed = ids.parse(row.numpy(), tokenizer)
        assert parsed.terminated
        assert parsed.problem is None
        decoding = codec.decode(parsed.fast_ids, 16, 8)
        np.testing.assert_allclose(decoding.actions, chunk, rtol=0, atol=0.1)  # the codec quantises by 0.1
