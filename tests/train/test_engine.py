"""The engine in one process: what learns, at which rates, the moving average, going on bit for bit, what it refuses."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ki_edge.errors import ArgumentError, CheckpointError, DivergedError
from ki_edge.model import load_model
from ki_edge.planning.settings import GROUPS, TrainSettings
from ki_edge.train.centering import CenteredPatches, Folding
from ki_edge.train.parallel.engine import Engine
from ki_edge.train.parallel.groups import group_of
from ki_edge.train.step.batch import Batch

sys.path.insert(0, str(Path(__file__).parent))
from parallel_parts import MICRO, random_batch, random_model, train

SETTINGS = TrainSettings(batch=4, steps=20, warmup=2, bfloat16=False, ema=0.9)


def state(engine):
    return {name: value.detach().clone() for name, value in engine.model.named_parameters()}


def changed(engine, before):
    """Groups of which something is not as it was."""
    return {group_of(name) for name, value in state(engine).items() if not torch.equal(value, before[name])}


# ---------------------------------------------------------------------- what learns


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, set(GROUPS)),
        ({"freeze": ("vision", "embeddings")}, {"projector", "backbone", "expert"}),
        ({"expert_only": True}, {"expert"}),
        ({"fast_loss": False}, {"expert"}),  # insulated, the backbone learns from tokens alone
        ({"fast_loss": False, "knowledge_insulation": False}, set(GROUPS)),
        ({"fast_weight": 0.0, "text_weight": 0.0}, {"expert"}),
        ({"lora": (("backbone", 2),), "freeze": ("vision", "projector", "embeddings", "expert")}, {"backbone"}),
    ],
)
def test_what_learns(settings, expected):
    engine = Engine(random_model(), replace(SETTINGS, **settings))
    before = state(engine)
    train(engine, 0, 2)
    assert changed(engine, before) == expected
    assert {group_of(name) for name in engine.average.values} == expected


def test_what_has_no_postfix_counts_in_no_mean_of_tokens():
    """A chunk that is too long or cannot be spelled: the mean is over the others."""
    batch = random_batch(0, 4)
    batch.observation.fast_mask[1:3] = False
    engine = Engine(random_model(), SETTINGS)
    each = engine.model.compute_loss(batch.observation, batch.actions, noise=batch.noise, time=batch.time).fast.detach()
    assert batch.counts()[1:].tolist() == [2, 0] and each[1:3].tolist() == [0, 0]
    result = engine.train_step([batch], 1e-3)
    assert result.terms["fast"] == pytest.approx(float(each[0] + each[3]) / 2, rel=1e-6)
    assert result.tokens.isnan().tolist() == [False, True, True, False]
    assert result.spelled.tolist() == [1, 0, 0, 1]


def test_every_parameter_that_may_learn_gets_a_gradient():
    """None may be waited for in vain where processes exchange them."""
    for settings in ({}, {"fast_loss": False, "knowledge_insulation": False}, {"expert_only": True}):
        engine = Engine(random_model(), replace(SETTINGS, **settings))
        before = state(engine)
        train(engine, 0, 1)
        same = {name for name in engine.learning if torch.equal(before[name], state(engine)[name])}
        assert not same


def test_rates_by_group():
    """Adam's first step is the rate, whatever the gradient."""
    settings = replace(SETTINGS, rates=(("vision", 0.1), ("expert", 3.0)), weight_decay=0.0, clip=1e9, warmup=0)
    engine = Engine(random_model(), settings)
    before = state(engine)
    train(engine, 0, 1)
    steps = {name: (value - before[name]).abs().max().item() for name, value in state(engine).items()}
    for name, factor in (
        ("vision.post_layernorm.weight", 0.1),
        ("backbone.norm.weight", 1.0),
        ("expert.norm.dense.bias", 3.0),
    ):
        assert steps[name] == pytest.approx(1e-3 * factor, rel=1e-3), name


def test_only_matrices_decay():
    engine = Engine(random_model(), replace(SETTINGS, weight_decay=10.0, learning_rate=1e-3, warmup=0))
    plain = Engine(random_model(), replace(SETTINGS, weight_decay=0.0, learning_rate=1e-3, warmup=0))
    start = state(plain)
    train(engine, 0, 1)
    train(plain, 0, 1)
    for name, value in state(plain).items():
        lost = 1e-3 * 10.0 * start[name] if value.ndim >= 2 else torch.zeros_like(value)
        torch.testing.assert_close(state(engine)[name], value - lost, rtol=1e-5, atol=1e-6, msg=name)


# ---------------------------------------------------------------------- the moving average


def test_the_average_is_its_formula_and_evaluation_leaves_no_trace():
    engine = Engine(random_model(), SETTINGS)
    expected = state(engine)
    for step in range(5):
        train(engine, step, step + 1)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = {name: decay * old + (1 - decay) * state(engine)[name] for name, old in expected.items()}
    weights = state(engine)
    with engine.averaged() as model:
        assert not model.training
        for name, value in expected.items():
            torch.testing.assert_close(model.get_parameter(name), value, rtol=1e-6, atol=1e-7)
        batch = random_batch(9, 4)
        assert (
            model.compute_loss(batch.observation, batch.actions, noise=batch.noise[:4], time=batch.time[:4])
            .flow.isfinite()
            .all()
        )
    assert all(torch.equal(value, weights[name]) for name, value in state(engine).items()) and engine.model.training
    for name, value in engine.averaged_tensors():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


def test_an_error_in_evaluation_leaves_no_trace_either():
    engine = Engine(random_model(), SETTINGS)
    train(engine, 0, 2)
    weights = state(engine)
    with pytest.raises(KeyError), engine.averaged():
        raise KeyError
    assert all(torch.equal(value, weights[name]) for name, value in state(engine).items())


def test_without_an_average_the_checkpoint_is_the_weights(tmp_path):
    engine = Engine(random_model(), replace(SETTINGS, ema=0.0))
    train(engine, 0, 2)
    assert engine.average.values == {}
    engine.save_checkpoint(tmp_path)
    for name, value in load_model(tmp_path).state_dict().items():
        assert torch.equal(value, engine.model.get_parameter(name)), name


def test_a_mean_picture_that_is_taken_away_is_in_the_checkpoints_positions(tmp_path):
    model = random_model()
    center = torch.rand(1, 3, 14, 14, generator=torch.Generator().manual_seed(0)) - 0.5
    CenteredPatches.install(model, center)
    engine = Engine(model, SETTINGS)
    engine.finish = Folding(center)
    train(engine, 0, 2)
    engine.save_checkpoint(tmp_path)
    batch = random_batch(9, 4, draws=1)
    arguments = {"noise": batch.noise, "time": batch.time}
    with engine.averaged() as averaged:
        ours = averaged.compute_loss(batch.observation, batch.actions, **arguments)
    with torch.no_grad():
        theirs = load_model(tmp_path).compute_loss(batch.observation, batch.actions, **arguments)
    torch.testing.assert_close(theirs.flow, ours.flow, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs.fast, ours.fast, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- going on


@pytest.mark.parametrize(
    "settings",
    [{}, {"bfloat16": True, "accumulate": 2, "checkpointing": True}, {"lora": (("expert", 2),)}, {"ema": 0.0}],
)
def test_ten_and_ten_steps_are_twenty_bit_for_bit(tmp_path, settings):
    settings = replace(SETTINGS, **settings)
    straight = Engine(random_model(), settings)
    records = train(straight, 0, 20)
    first = Engine(random_model(), settings)
    again = train(first, 0, 10)
    first.save_state(tmp_path / "state")
    second = Engine(random_model(seed=5), settings)  # its weights come from the state
    second.load_state(tmp_path / "state")
    assert second.step == 10
    assert again + train(second, 10, 20) == records
    assert all(torch.equal(value, state(straight)[name]) for name, value in state(second).items())
    for name, value in straight.average.values.items():
        assert torch.equal(value, second.average.values[name]), name


def test_moments_in_eight_bits_are_saved_by_one_process(tmp_path):
    """Several parameters have such moments; what their bytes stand for is one table for all, which no state holds."""
    pytest.importorskip("bitsandbytes", reason="pip install 'ki-edge[adamw8bit]'")
    config = replace(MICRO, vocab_size=1024, expert=replace(MICRO.expert, mlp_dim=512))
    config = replace(config, backbone=replace(MICRO.backbone, mlp_dim=512))
    settings = replace(SETTINGS, optimizer="adamw8bit")
    straight, first = (Engine(random_model(config), settings) for _ in range(2))
    train(straight, 0, 4)
    train(first, 0, 2)
    first.save_state(tmp_path)
    second = Engine(random_model(config, seed=9), settings)
    second.load_state(tmp_path)
    train(second, 2, 4)
    assert all(torch.equal(value, state(straight)[name]) for name, value in state(second).items())


def test_a_state_before_the_first_step(tmp_path):
    engine = Engine(random_model(), SETTINGS)
    engine.save_state(tmp_path)
    other = Engine(random_model(seed=5), SETTINGS)
    other.load_state(tmp_path)
    assert other.step == 0 and train(other, 0, 3) == train(engine, 0, 3) == train(
        Engine(random_model(), SETTINGS), 0, 3
    )


def test_nothing_in_a_state_can_be_run(tmp_path):
    """Files of tensors alone: what would unpickle is not there."""
    Engine(random_model(), SETTINGS).save_state(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}


def test_states_that_cannot_be_read(tmp_path):
    engine = Engine(random_model(), SETTINGS)
    with pytest.raises(CheckpointError, match=r"missing holds no training state: resume another checkpoint"):
        engine.load_state(tmp_path / "missing")
    other = Engine(random_model(replace(MICRO, vocab_size=64)), SETTINGS)
    other.save_state(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"other cannot be read: .*"):
        engine.load_state(tmp_path / "other")
    adapted = Engine(random_model(), replace(SETTINGS, lora=(("vision", 2),)))
    engine.save_state(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"plain cannot be read: Missing key .*lora_A"):
        adapted.load_state(tmp_path / "plain")
    path = next((tmp_path / "plain").iterdir())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"plain cannot be read: "):
        engine.load_state(tmp_path / "plain")


def test_a_full_disk_names_the_state(tmp_path, largest_file):
    engine = Engine(random_model(), SETTINGS)
    with largest_file(1000), pytest.raises(CheckpointError, match=r"state cannot be written: .*File too large"):
        engine.save_state(tmp_path / "state")
    train(engine, 0, 1)  # the run itself could go on


# ---------------------------------------------------------------------- what a step tells, and what it refuses


def test_a_step_tells_of_every_sample():
    engine = Engine(random_model(), replace(SETTINGS, batch=6))
    batch = random_batch(0, 6, texts=2, delays=True)
    result = engine.train_step([batch], 1e-3)
    assert torch.equal(result.row, batch.row) and torch.equal(result.source, batch.source)
    assert torch.equal(result.kind, batch.kind) and torch.equal(result.task, batch.task)
    assert result.flow[:4].isfinite().all() and result.flow[4:].isnan().all() and result.tokens.isfinite().all()
    assert result.terms["fast"] == pytest.approx(result.tokens[:4].mean().item(), rel=1e-6)
    assert result.terms["text"] == pytest.approx(result.tokens[4:].mean().item(), rel=1e-6)
    counted = batch.free.reshape(2, 6, -1).sum(dim=(0, 2)).double() * batch.dims.sum(dim=1)
    mean = (result.flow[:4] * counted[:4]).sum() / counted.sum()
    assert result.terms["flow"] == pytest.approx(mean.item(), rel=1e-6)
    assert result.terms["total"] == pytest.approx(
        sum(result.terms[name] for name in ("flow", "fast", "text")), rel=1e-6
    )
    assert "text" not in engine.train_step([random_batch(1, 6)], 1e-3).terms


def broken(batch, **changes):
    return Batch(**{**vars(batch), **changes})


def test_a_loss_that_is_not_finite_changes_nothing_and_names_its_samples():
    engine = Engine(random_model(), SETTINGS)
    train(engine, 0, 2)
    before, average = state(engine), {name: value.clone() for name, value in engine.average.values.items()}
    batch = random_batch(2, 4)
    actions = batch.actions.clone()
    actions[2, 0, 0] = torch.nan
    with pytest.raises(DivergedError, match=r"training diverged at step 2: the loss is not finite") as caught:
        engine.train_step([broken(batch, actions=actions)], 1e-3)
    assert caught.value.step == 2 and caught.value.samples == [(int(batch.source[2]), int(batch.row[2]))]
    assert engine.step == 2 and all(torch.equal(value, before[name]) for name, value in state(engine).items())
    assert all(torch.equal(value, engine.average.values[name]) for name, value in average.items())
    reference = Engine(random_model(), SETTINGS)
    assert train(reference, 0, 3)[2] == train(engine, 2, 3)[0]  # and the run could go on with another batch


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze": ("wheels",)}, "freeze wheels: no such group of parameters, there are vision, projector"),
        ({"rates": (("wheels", 1.0),)}, "rate wheels: no such group"),
        ({"lora": (("wheels", 1),)}, "lora wheels: no such group"),
        ({"rates": (("vision", 0.0),)}, "rate vision=0.0: expected a factor above 0; --freeze vision"),
        ({"lora": (("vision", 0),)}, "lora vision=0: expected a rank of 1 to 1024"),
        ({"freeze": ("vision",), "lora": (("vision", 4),)}, "vision: it stays as it is, so it can have neither"),
        ({"expert_only": True, "rates": (("backbone", 2.0),)}, "backbone: it stays as it is"),
        ({"accumulate": 0}, "accumulate 0: expected at least 1"),
        ({"accumulate": 3}, r"batch 4: cannot be split over 1 processes with 3 batches each; choose a multiple of 3"),
        ({"optimizer": "sgd"}, "optimizer sgd: expected one of adamw, adamw8bit"),
        ({"beta1": 1.0}, "beta1 1.0: expected 0 <= value < 1"),
        ({"weight_decay": -1.0}, "weight_decay -1.0: expected 0 or more"),
        ({"freeze": GROUPS}, "everything is frozen: nothing is left to learn"),
        ({"freeze": ("expert",), "fast_loss": False}, "everything is frozen"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ArgumentError, match=message):
        Engine(random_model(), replace(SETTINGS, **settings))


def test_an_unknown_strategy():
    with pytest.raises(ArgumentError, match="strategy zero: expected one of auto, ddp, fsdp2"):
        Engine(random_model(), SETTINGS, strategy="zero")


def test_missing_libraries_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim.adamw", None)
    with pytest.raises(ArgumentError, match="adamw8bit: needs bitsandbytes: pip install"):
        Engine(random_model(), replace(SETTINGS, optimizer="adamw8bit"))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ArgumentError, match="lora: needs PEFT: pip install"):
        Engine(random_model(), replace(SETTINGS, lora=(("expert", 2),)))
