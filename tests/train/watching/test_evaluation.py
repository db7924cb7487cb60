"""Evaluation on held-out samples: against each number computed the slow way, and by one process as by two."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from ki_edge.train.step.batch import ACTIONS
from ki_edge.train.watching.evaluation import PREFIX, evaluate


@pytest.fixture(scope="module")
def found(toy, toy_data):
    return evaluate(toy.ToyEngine(toy.toy_model()), toy_data, num_steps=3)


@pytest.fixture(scope="module")
def samples(toy, toy_data):
    """(row, its batch of one, losses and sampled chunk of it alone) of every sample."""
    model, out = toy.toy_model().eval(), []
    for row in range(len(toy_data.images)):
        batch = toy_data.rows([row], toy_data.seed + 1)
        with torch.no_grad():
            losses = model.compute_loss(
                batch.observation, batch.actions, noise=batch.noise, time=batch.time, real=batch.real
            )
            logits = model.fast_logits(batch.observation)
            chunk = model.sample_actions(batch.observation, noise=batch.noise[:1], num_steps=3)[0].double().numpy()
        out.append((row, batch, losses, logits, chunk))
    return out


def test_losses_and_accuracy(found, samples):
    flow, fast, right, count = [], {True: [], False: []}, {True: 0, False: 0}, {True: 0, False: 0}
    for _, batch, losses, logits, _ in samples:
        acts = bool(batch.kind[0] == ACTIONS)
        if acts:
            flow.append(losses.flow[:, batch.real[0]][..., batch.dims[0]].mean().item())
        mask = batch.observation.fast_mask[0]
        targets = batch.observation.fast_tokens[0][mask].long()
        chances = torch.log_softmax(logits[0][mask], dim=-1)
        fast[acts].append(-chances[torch.arange(len(targets)), targets].mean().item())
        right[acts] += int((logits[0][mask].argmax(dim=-1) == targets).sum())
        count[acts] += len(targets)
    values = found.values
    assert values[PREFIX + "flow"] == pytest.approx(np.mean(flow), rel=1e-5)
    assert values[PREFIX + "fast"] == pytest.approx(np.mean(fast[True]), rel=1e-5)
    assert values[PREFIX + "text"] == pytest.approx(np.mean(fast[False]), rel=1e-5)
    assert values[PREFIX + "fast_accuracy"] == pytest.approx(right[True] / count[True])
    assert values[PREFIX + "text_accuracy"] == pytest.approx(right[False] / count[False])


def test_errors_of_sampled_actions_are_in_robot_units_over_recorded_actions(found, samples, toy):
    apart, plain = {0: [], 1: []}, []
    for _, batch, _, _, chunk in samples:
        if batch.kind[0] == ACTIONS:
            real, dims, source = batch.real[0].numpy(), batch.dims[0].numpy(), int(batch.source[0])
            error = np.abs(chunk - batch.actions[0].double().numpy())[real][:, dims]
            apart[source] += (error * toy.SCALES[source]).ravel().tolist()
            plain += error.ravel().tolist()
    values = found.values
    assert PREFIX + "action_error" not in values  # of robots whose units differ there is no mean
    assert values[PREFIX + "action_error_normalised"] == pytest.approx(np.mean(plain), rel=1e-5)
    for source, name in enumerate(("one", "two")):
        assert values[f"{PREFIX}action_error/{name}"] == pytest.approx(np.mean(apart[source]), rel=1e-5)
    assert f"{PREFIX}action_error/questions" not in values


def test_an_untrained_models_tokens_spell_no_actions(found):
    assert found.values[PREFIX + "fast_undecodable"] == 1.0
    assert PREFIX + "fast_action_error" not in found.values
    assert all(prediction.fast is None for prediction in found.predictions)


def test_tokens_that_spell_the_recorded_actions_have_the_codecs_error_alone(toy, toy_data):
    model = toy.toy_model()

    def told(observation):
        """Logits that know every token."""
        return torch.nn.functional.one_hot(observation.fast_tokens.long(), toy.CONFIG.vocab_size).float() * 50

    model.fast_logits = told
    values = evaluate(toy.ToyEngine(model), toy_data, num_steps=1).values
    assert values[PREFIX + "fast_accuracy"] == values[PREFIX + "text_accuracy"] == 1.0
    assert values[PREFIX + "fast_undecodable"] == 0.0
    assert 0 < values[PREFIX + "fast_action_error_normalised"] < 0.05  # half a step of the DCT's quantisation


def test_predictions_are_what_a_robot_would_get(found, toy, toy_data):
    assert len(found.predictions) == 4
    for row, prediction in zip((1, 3, 5, 7), found.predictions, strict=True):  # spread over the eight samples
        source = row % 2
        assert prediction.where == f"{toy_data.names[source]}, episode {row}"
        assert prediction.task == toy_data.tasks[source] and len(prediction.names) == len(toy.SCALES[source])
        length = 2 if row in (3, 7) else toy.HORIZON  # every fourth is padded after two
        expected = toy_data.actions[row][:length, : len(toy.SCALES[source])] * toy.SCALES[source]
        np.testing.assert_allclose(prediction.recorded, expected, atol=1e-5)
        assert prediction.flow.shape == prediction.recorded.shape


def test_nothing_held_out_is_nothing_to_tell(toy, tokenizer_model):
    found = evaluate(toy.ToyEngine(toy.toy_model()), toy.ToyData(tokenizer_model, held_out=False))
    assert found.values == {} and found.predictions == ()


OPTIONS = ({}, {"count": 7, "texts": 0}, {"count": 1, "texts": 0})  # of the data: as many batches for each, more, none


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_find_what_one_finds(found, toy, tokenizer_model, tmp_path, strategy):
    """With the real engine, also where one process has more batches than the other."""
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model)
    (tmp_path / "evaluate.py").write_text(
        textwrap.dedent(
            """
            import json, sys
            from pathlib import Path
            import toy
            from ki_edge.train.parallel.engine import Engine
            from ki_edge.planning.settings import TrainSettings
            from ki_edge.train.watching.evaluation import evaluate
            engine = Engine(toy.toy_model(), TrainSettings(batch=2, bfloat16=False), strategy=sys.argv[1])
            values = []
            for options in json.loads(sys.argv[2]):
                data = toy.ToyData(Path("tokenizer.model").read_bytes(), **options)
                found = evaluate(engine, data, num_steps=3)
                values.append((found.values, len(found.predictions)))
            Path(f"found{engine.rank}.json").write_text(json.dumps(values))
            engine.close()
            """
        )
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "evaluate.py", strategy, json.dumps(OPTIONS)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    ours, theirs = (json.loads((tmp_path / f"found{rank}.json").read_text()) for rank in range(2))
    assert [values for values, _ in ours] == [values for values, _ in theirs]
    assert [shown for _, shown in theirs] == [0, 0, 0] and ours[0][1] == 4
    assert ours[0][0] == pytest.approx(found.values, rel=1e-5)
    for (values, _), options in zip(ours[1:], OPTIONS[1:], strict=True):
        alone = evaluate(toy.ToyEngine(toy.toy_model()), toy.ToyData(tokenizer_model, **options), num_steps=3)
        assert values == pytest.approx(alone.values, rel=1e-5)
