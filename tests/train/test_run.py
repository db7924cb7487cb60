"""Training runs end to end: learning, resuming, repeating, and what is refused."""

import json
import math
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ki_edge.checkpoints import Checkpoint
from ki_edge.errors import ArgumentError, CheckpointError, DatasetError
from ki_edge.model import Observation, load_model
from ki_edge.train.centering import CenteredPatches
from ki_edge.train.run import open_trainer
from ki_edge.train.step.settings import TrainSettings

QUICK = TrainSettings(steps=6, batch=8, warmup=2, save_every=3, log_every=1, flow_draws=2)


@pytest.fixture
def train(demonstrations, small_config, tmp_path):
    """train(name, settings=QUICK, stop=None, **options) -> (Trainer, records); `stop`: leave after that many steps."""

    def run(name, settings=QUICK, *, stop=None, **options):
        trainer = open_trainer(demonstrations, tmp_path / name, small_config, settings, **options)
        return trainer, list(islice(trainer.run(), stop))

    return run


def weights(trainer):
    """Everything that a run would go on with."""
    state = {f"model.{name}": value for name, value in trainer.model.state_dict().items()}
    state |= {f"average.{name}": value for name, value in trainer.average.items()}
    for index, parameter in enumerate(p for group in trainer.optimizer.param_groups for p in group["params"]):
        state |= {f"{index}.{name}": value for name, value in trainer.optimizer.state[parameter].items()}
    return state


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(value, second[name]) for name, value in first.items())


def without_speed(records):
    return [{name: value for name, value in record.items() if name != "samples_per_s"} for record in records]


def first_frames(trainer, count=3):
    """An observation of recorded frames, as the trainer feeds it but without FAST tokens."""
    examples = trainer.examples
    images = torch.from_numpy(np.array(examples.images[:count]))
    prompt = (torch.from_numpy(array[:count]) for array in (examples.prompt.ids, examples.prompt.mask))
    return Observation(images, torch.ones(images.shape[:2], dtype=torch.bool), *prompt)


# ---------------------------------------------------------------------- learning


def test_training_then_inference(train, tmp_path):
    """All three losses fall, and the checkpoint on disk acts like the model in memory."""
    settings = replace(QUICK, steps=60, save_every=60, learning_rate=5e-3, ema=0.0, bfloat16=False)
    trainer, records = train("run", settings)
    for term in ("flow", "fast", "pointing"):
        first, last = (np.mean([record[term] for record in part]) for part in (records[:6], records[-6:]))
        assert last < 0.8 * first, term
    observation = first_frames(trainer)
    noise = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    loaded = load_model(tmp_path / "run")
    actions = loaded.sample_actions(observation, noise=noise)
    assert torch.isfinite(actions).all()
    # ema 0: the saved average is the model; its centred patches were folded into an ordinary embedding
    torch.testing.assert_close(
        trainer.model.eval().sample_actions(observation, noise=noise), actions, rtol=0, atol=1e-4
    )
    tokens = loaded.sample_fast_tokens(observation, max_tokens=10, constrained=False)
    assert tokens.shape[0] == 3
    log = (tmp_path / "run" / "training" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in log] == records
    assert [record["step"] for record in records] == list(range(1, 61))


def test_the_checkpoint_folder_is_complete(train, tmp_path):
    trainer, _ = train("run")
    assert Checkpoint.open(tmp_path / "run").config == trainer.recipe.config
    files = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert files == {
        "model.safetensors", "config.json", "contract.json", "assets/tokenizer.model", "assets/norm_stats.json",
        "assets/fast/tokenizer.json", "assets/fast/processor_config.json", "assets/fast/tokenizer_config.json",
        "assets/fast/special_tokens_map.json", "training/state.safetensors", "training/log.jsonl",
    }  # fmt: skip


def test_flow_loss_of_a_step_ignores_the_padding(train, monkeypatch):
    """The robot has three action numbers, the model four: the fourth teaches nothing."""
    trainer, _ = train("run", stop=0)
    trainer.examples.actions[..., 3:] = 100.0
    padded = trainer._losses(np.random.default_rng(0))["flow"]
    trainer.examples.actions[..., 3:] = 0.0
    trainer.model.action_out_proj.bias.data[3] = 1e3
    assert padded < 10
    assert trainer._losses(np.random.default_rng(0))["flow"] < 10


def test_plain_training_has_no_token_losses(train):
    trainer, records = train("run", replace(QUICK, knowledge_insulation=False, steps=2))
    assert not trainer.model.knowledge_insulation
    assert records[0].keys() == {"step", "flow", "grad_norm", "rate", "samples_per_s"}


def test_pointing_can_be_left_out(train):
    _, records = train("run", replace(QUICK, pointing=0.0, steps=2))
    assert "pointing" not in records[0]
    assert "fast" in records[0]


def test_weights_of_the_token_losses(train):
    """With weight 0 the backbone learns nothing: the flow loss does not reach it."""
    trainer, _ = train("run", replace(QUICK, fast_weight=0.0, weight_decay=0.0))
    for _, parameter in trainer.model.backbone_parameters():
        moments = trainer.optimizer.state[parameter]
        assert not moments or not moments["exp_avg"].any()
    for _, parameter in trainer.model.expert_parameters():
        assert trainer.optimizer.state[parameter]["exp_avg"].any()


def test_divergence_is_reported(train):
    with pytest.raises(DatasetError, match=r"diverged at step \d+: .* lower the learning rate"):
        train("run", replace(QUICK, learning_rate=1e30, warmup=0))


# ---------------------------------------------------------------------- resuming and repeating


@pytest.mark.parametrize("bfloat16", [False, True])
def test_resuming_is_exact(train, tmp_path, bfloat16):
    """Interrupted in step 5, after the save of step 3: the resumed run equals the uninterrupted one, bit for bit."""
    settings = replace(QUICK, bfloat16=bfloat16)
    whole, records = train("whole", settings)
    train("parts", settings, stop=5)
    resumed = train("parts", settings, stop=0, resume=True)[0]
    assert resumed.step == 3
    later = list(resumed.run())
    assert same(weights(whole), weights(resumed))
    assert without_speed(later) == without_speed(records[3:])
    saved = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts")]
    assert same(*saved)


def test_a_seed_fixes_everything(train):
    (first, records), (again, same_records) = train("first"), train("again")
    other, other_records = train("other", replace(QUICK, seed=1))
    assert same(weights(first), weights(again))
    assert without_speed(records) == without_speed(same_records)
    assert not same(weights(first), weights(other))
    assert records[0]["flow"] != other_records[0]["flow"]


def test_a_finished_run_resumes_to_nothing(train):
    whole, _ = train("run")
    again, records = train("run", resume=True)
    assert records == []
    assert same(weights(whole), weights(again))


def test_a_run_is_never_overwritten_unasked(train, tmp_path):
    train("run")
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(ArgumentError, match="holds a training run: go on with --resume, or start over with --fresh"):
        train("run", replace(QUICK, seed=1))
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_fresh_starts_over(train, tmp_path):
    train("run")
    trainer, _ = train("run", replace(QUICK, seed=1), stop=2, fresh=True)
    assert trainer.step == 2
    log = (tmp_path / "run" / "training" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2]
    with pytest.raises(ArgumentError, match="holds no training run to resume"):  # the old one is gone
        train("run", resume=True)


def test_nothing_to_resume(train):
    with pytest.raises(ArgumentError, match="holds no training run to resume: leave --resume out"):
        train("run", resume=True)


# ---------------------------------------------------------------------- starting from a checkpoint


def test_starting_from_a_checkpoint(train, tmp_path):
    """The run begins as the checkpoint, although its mean picture is now taken out."""
    train("first")
    trainer, _ = train("second", stop=0, init=tmp_path / "first")
    start, model = load_model(tmp_path / "first"), trainer.model.eval()
    assert CenteredPatches.center_of(model) is not None
    pixels = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    # what the folded embedding loses in float32; the network behind it may make a thousand times more of it
    torch.testing.assert_close(model.vision(pixels), start.vision(pixels), rtol=0, atol=1e-5)
    before = start.state_dict()
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert moved == ["vision.embeddings.position_embedding.weight"]


def test_starting_from_another_geometry(train, small_config, demonstrations, tmp_path):
    train("first")
    deeper = replace(small_config, vision=replace(small_config.vision, mlp_dim=20))
    with pytest.raises(ArgumentError, match="cannot be the start of this run"):
        open_trainer(demonstrations, tmp_path / "second", deeper, QUICK, init=tmp_path / "first")
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        train("second", init=tmp_path / "none")


# ---------------------------------------------------------------------- settings


def test_learning_rate(train):
    settings = TrainSettings(steps=1000, learning_rate=2e-3, warmup=100, final_rate=0.1)
    rates = [settings.rate(step) for step in range(1001)]
    np.testing.assert_allclose(rates[:100], 2e-3 * np.arange(1, 101) / 100)
    assert rates[100] == pytest.approx(2e-3)
    assert rates[550] == pytest.approx(2e-3 * (0.1 + 0.9 * 0.5))  # half way down the cosine
    assert rates[1000] == pytest.approx(2e-4)
    assert all(np.diff(rates[100:]) <= 0)
    assert math.isfinite(TrainSettings(steps=1, warmup=0).rate(0))


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0}, {"batch": 0}, {"flow_draws": -1}, {"save_every": 0}, {"log_every": 0}, {"pointing": 1.0},
        {"ema": 1.0}, {"seed": -1},
    ],
)  # fmt: skip
def test_impossible_settings(changes):
    with pytest.raises(ArgumentError, match=f"{next(iter(changes))} .*expected"):
        replace(QUICK, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch": 13, "pointing": 0.0},
            "a batch takes 13 frames for actions and 0 for pointing, but .* have 12 and 10",
        ),
        ({"batch": 22, "pointing": 0.5}, "takes 11 frames for actions and 11 for pointing"),
        ({"batch": 4, "pointing": 0.9}, "takes 0 frames for actions and 4 for pointing"),
    ],
)
def test_batches_that_the_demonstrations_cannot_fill(train, changes, message):
    with pytest.raises(DatasetError, match=message):
        train("run", replace(QUICK, **changes))


def test_wrong_output_and_threads(train, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ArgumentError, match="is a file: name a folder"):
        train("run")
    with pytest.raises(ArgumentError, match="threads -1"):
        train("other", threads=-1)
