"""Estimates of training: counts against real parameters, memory against what PyTorch keeps and what a process takes."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ki_edge.config import PI05, PRESETS, TINY
from ki_edge.errors import ArgumentError
from ki_edge.model import Observation, Pi05
from ki_edge.planning.memory import BACKBONE_SIDE, Samples, Setup, need
from ki_edge.planning.plan import WAYS, assumptions, bytes_table, device_table, largest_batch, scale_table
from ki_edge.planning.speed import CARDS, exchanged, forward_products, speed, step_products
from ki_edge.planning.weights import count

SHORT = replace(TINY, vocab_size=2048)
EXACT = 0.08  # of what the graph of one step keeps: small tensors are not counted, K and V repeated by draw not kept
WHOLE = 0.3  # of a process' memory: fragments, and libraries that load with their first use


def loss(model, samples):
    """A step's loss for random samples."""
    config, size = model.config, model.config.vision.image_size
    random = torch.Generator().manual_seed(0)
    batch = samples.batch

    def ids(length):
        return torch.randint(0, config.vocab_size, (batch, length), generator=random)

    def mask(*shape):
        return torch.ones(shape, dtype=torch.bool)

    postfix = (ids(samples.postfix), mask(batch, samples.postfix)) if samples.postfix else (None, None)
    images = torch.zeros(batch, samples.cameras, size, size, 3, dtype=torch.uint8)
    observation = Observation(
        images, mask(batch, samples.cameras), ids(samples.prompt), mask(batch, samples.prompt), *postfix
    )
    draws = torch.zeros(batch * samples.draws, config.action_horizon, config.action_dim)
    found = model.compute_loss(observation, draws[:batch], noise=draws, time=torch.full((len(draws),), 0.5))
    return found.flow.mean() + (0.0 if found.fast is None else found.fast.mean())


def kept(model, samples):
    """Bytes of the tensors that a step keeps for its backward pass, without parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = loss(model, samples)
    assert total.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize(
    ("samples", "insulated"),
    [
        (Samples(8, 2, 48, 24, 4), True), (Samples(4, 1, 20, 64, 1), True), (Samples(8, 2, 48, 0, 1), True),
        (Samples(4, 2, 48, 0, 2), False), (Samples(3, 3, 100, 30, 8), True),
    ],
)  # fmt: skip
def test_activations_are_what_pytorch_keeps(samples, insulated):
    model = Pi05(SHORT, knowledge_insulation=insulated)
    found = need(SHORT, samples, Setup(bfloat16=False, insulated=insulated))
    # of the logits the softmax alone is kept; the rest is there for a moment
    expected = found.activations + found.logits / 3
    assert kept(model, samples) == pytest.approx(expected, rel=EXACT)


def test_frozen_groups_keep_nothing():
    samples, model = Samples(6, 2, 48, 24, 1), Pi05(SHORT)
    model.vision.requires_grad_(False)
    found = need(SHORT, samples, Setup(bfloat16=False, freeze=("vision",)))
    assert kept(model, samples) == pytest.approx(found.activations + found.logits / 3, rel=EXACT)
    assert found.parameters.learning == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_layers_that_are_computed_again_keep_their_inputs():
    samples = Samples(8, 2, 48, 24, 4)
    plain, again = (need(SHORT, samples, Setup(bfloat16=False, checkpointing=value)) for value in (False, True))
    assert again.activations < 0.5 * plain.activations and again.states == plain.states


@pytest.mark.parametrize(
    ("preset", "samples"), [("tiny", Samples(24, 2, 48, 24, 4)), ("small", Samples(2, 2, 48, 24, 2))]
)
def test_a_training_process_takes_what_was_estimated(preset, samples):
    """Peak memory of a process that takes two steps, less what it had after steps of a tiny model."""
    code = textwrap.dedent(
        """
        import json, sys
        import torch
        sys.path.insert(0, sys.argv[1])
        from test_planning import Samples, loss
        from ki_edge.config import PRESETS, TINY
        from ki_edge.model import Pi05
        from ki_edge.proc import peak_memory

        def train(config, samples):
            model = Pi05(config)
            average = {name: value.clone() for name, value in model.state_dict().items()}
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
            for _ in range(2):
                optimizer.zero_grad()
                loss(model, samples).backward()
                optimizer.step()
                for name, value in model.state_dict().items():
                    average[name].lerp_(value, 0.01)

        train(TINY, Samples(1, 1, 8, 8, 1))
        before = peak_memory()
        train(PRESETS[sys.argv[2]], Samples(*json.loads(sys.argv[3])))
        print(peak_memory() - before)
        """
    )
    arguments = [str(Path(__file__).parent), preset, json.dumps(list(vars(samples).values()))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = need(PRESETS[preset], samples, Setup(bfloat16=False))
    assert int(done.stdout) == pytest.approx(found.total, rel=WHOLE)


def test_parameters_by_group():
    weights = count(PI05)
    assert weights.total == weights.learning == 3_353_433_872 and weights.resting == weights.adapters == 0
    assert weights.inside + weights.outside == weights.total and weights.outside > 257_152 * 2048
    expert = count(PI05, BACKBONE_SIDE)
    assert expert.learning + expert.resting == weights.total and 400e6 < expert.learning < 450e6
    adapted = count(PI05, lora={"backbone": 16})
    assert 0 < adapted.adapters < 0.02 * weights.total and adapted.learning < weights.total / 2


def test_states_are_twenty_bytes_a_parameter_or_shards_of_it():
    samples = Samples()
    single = need(PI05, samples, Setup())
    assert single.states + single.gradients == 20 * single.parameters.total
    shards = need(PI05, samples, Setup("fsdp2", 64))
    assert shards.states + shards.gradients == pytest.approx(20 * shards.parameters.total / 64)
    assert need(PI05, samples, Setup("ddp", 8, average=False, optimizer="adamw8bit")).states < 0.4 * single.states


def test_products_are_six_times_parameters_times_tokens_and_the_attention():
    """The rule of thumb, for the backbone of a long text without pictures' attention."""
    samples = Samples(1, 1, 200, 64, 1)
    weights, tokens = count(PI05, ("vision", "projector", "embeddings", "expert")).learning, 256 + 264
    found = forward_products(PI05, samples)["backbone"]
    assert found == pytest.approx(2 * weights * tokens, rel=0.03)
    assert step_products(PI05, samples, Setup()) == pytest.approx(3 * sum(forward_products(PI05, samples).values()))
    alone = step_products(PI05, replace(samples, postfix=0), Setup())
    assert alone < 0.5 * step_products(PI05, samples, Setup())  # insulated: no backward pass through the backbone


def test_devices_exchange_gradients_or_shards():
    replicas, shards = Setup("ddp", 8), Setup("fsdp2", 8)
    whole = need(PI05, Samples(), replicas)
    assert exchanged(whole, replicas) == pytest.approx(2 * 7 / 8 * 4 * whole.parameters.total)
    assert exchanged(need(PI05, Samples(), shards), shards) < 1.01 * exchanged(whole, replicas)
    assert exchanged(need(PI05, Samples(), Setup()), Setup()) == 0


def test_more_devices_are_faster_until_the_links_are_full():
    card, samples = CARDS[2], Samples(batch=32)
    speeds = [
        speed(PI05, samples, setup, need(PI05, samples, setup), card).samples_per_s
        for setup in (Setup("fsdp2", devices, checkpointing=True) for devices in (8, 64, 1024))
    ]
    assert speeds[0] < speeds[1] < speeds[2] <= speeds[0] * 128.1


def test_the_largest_batch_is_the_largest():
    setup = replace(WAYS[2][1], checkpointing=True)
    batch = largest_batch(PI05, Samples(), setup, 48e9)
    fits = [need(PI05, Samples(batch=each), setup).total + 1.5e9 <= 48e9 for each in (batch, batch + 1)]
    assert fits == [True, False]
    assert largest_batch(PI05, Samples(), WAYS[0][1], 24e9) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Samples(batch=0), "batch 0: expected at least 1"),
        (lambda: Setup("ddp"), "1 devices with strategy ddp"),
        (lambda: Setup("zero"), "strategy 'zero': expected one of single, ddp, fsdp2"),
        (lambda: Setup(optimizer="sgd"), "optimizer 'sgd'"),
        (lambda: need(TINY, Samples(), Setup(freeze=("head",))), "group 'head': expected one of vision, projector"),
    ],
)
def test_impossible_setups_are_refused(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_the_docs_hold_the_tables_that_the_benchmark_prints():
    text = (Path(__file__).parents[1] / "docs" / "training-at-size.md").read_text(encoding="utf-8")
    for part in (bytes_table(), device_table(), scale_table(), assumptions()):
        assert "\n".join(part) in text
