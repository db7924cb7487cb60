"""A whole mixture: what batches hold, that they follow from the step, and what is held out."""

import numpy as np
import pytest
import torch

from ki_edge.errors import ArgumentError, DatasetError
from ki_edge.policy.contract import PolicyContract
from ki_edge.policy.images import fit_image
from ki_edge.policy.normalize import read_norm_stats
from ki_edge.train.data.encoding import TokenEncoder
from ki_edge.train.step.batch import ACTIONS, TEXT
from ki_edge.train.step.training_data import Share

pytest.importorskip("av", reason="pip install 'ki-edge[record]'")
from .test_loading import same


@pytest.fixture
def many(data):
    return data / "lerobot_dataset" / "many_v21"


@pytest.fixture
def samples(data):
    with np.load(data / "lerobot_dataset" / "many_v21.npz") as file:
        return dict(file)


def batches(data, first=0, share=None):
    return [batch for step in data.steps(first, share or Share()) for batch in step]


def rows(data):
    """(step, row of the batch) -> what one row has, over all batches."""
    return [(batch, at) for batch in batches(data) for at in range(len(batch))]


def test_every_frame_as_lerobot_would_train_on_it(many, samples, opened):
    data = opened(many, settings={"steps": 5, "batch": 10})
    seen = []
    for batch, at in rows(data):
        row = int(batch.row[at])
        seen.append(row)
        actions = data.unnormalize_actions(0, batch.actions[at].numpy())
        np.testing.assert_allclose(actions, samples["action"][row], atol=1e-5)
        np.testing.assert_array_equal(batch.real[at], ~samples["action_is_pad"][row])
        assert data.tasks[batch.task[at]] == samples["task"][row]
        assert batch.kind[at] == ACTIONS and batch.dims[at].all()
        for camera, name in enumerate(("top", "left_wrist")):
            wanted = fit_image(np.ascontiguousarray(samples[name][row].transpose(1, 2, 0)), 8, 8, "pil_pad")
            assert np.abs(batch.observation.images[at, camera].numpy().astype(int) - wanted).max() <= 1
        state = np.append(samples["joints"][row], samples["gripper"][row])
        wanted = data.recipe.encode_actions(
            samples["task"][row],
            data.recipe.normalize_state(0, state),
            batch.actions[at].numpy(),
        )
        observation = batch.observation
        np.testing.assert_array_equal(observation.prompt_tokens[at][observation.prompt_mask[at]], wanted[0])
        np.testing.assert_array_equal(observation.fast_tokens[at][observation.fast_mask[at]], wanted[1])
        decoded = data.decode_actions(0, wanted[1])
        assert np.abs(decoded - batch.actions[at].numpy()).max() < 0.2
    assert sorted(seen) == sorted(2 * list(range(25)))  # two epochs
    assert data.action_names(0) == ("a", "b", "c", "grip")
    assert data.where(0, 12) == f"{many}, episode 2, frame 2"


def test_episodes_shorter_than_the_horizon_are_padded(many, opened):
    data = opened(many, horizon=20, settings={"batch": 25})
    batch = next(data.steps(0, Share()))[0]
    real = {int(row): int(count) for row, count in zip(batch.row, batch.real.sum(dim=1), strict=True)}
    assert real[0] == 6 and real[5] == 1 and real[19] == 1 and real[10] == 9  # of episodes of 6, 1 and 9 frames


def test_rows_without_a_postfix_have_an_empty_one(many, opened, monkeypatch):
    """All processes and steps compute the same loss: where one had no tokens at all, the others would wait for it."""
    monkeypatch.setattr(TokenEncoder, "_postfix", lambda self, spelled: np.zeros(0, np.int32))
    data = opened(many, settings={"batch": 1, "held_out": 0.3})
    for batch in (next(data.steps(0, Share()))[0], next(data.held_out(Share()))):
        assert batch.observation.fast_tokens.shape == (1, 1) and not batch.observation.fast_mask.any()


def test_a_step_needs_none_of_those_before(many, opened):
    settings = {"augment": True, "rtc_max_delay": 2, "rtc_offset": 0.1}
    whole = batches(opened(many, settings=settings))
    for one, other in zip(whole[3:], batches(opened(many, settings=settings), first=3), strict=True):
        same(one, other)
    other = batches(opened(many, settings={**settings, "seed": 1}))
    assert not torch.equal(whole[0].noise, other[0].noise) and not torch.equal(whole[0].row, other[0].row)


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 3), (3, 2)])
def test_processes_and_parts_share_the_same_rows(many, opened, world, accumulate):
    data = opened(many)
    for step, whole in enumerate(batches(data)):
        parts = [
            part for rank in range(world) for part in next(data.steps(step, Share(rank, world, accumulate)))
        ]  # fmt: skip
        assert len(parts) == world * accumulate and len({len(part) for part in parts}) == 1
        for name in ("row", "actions", "real", "kind"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
        by_draw = [part.noise.unflatten(0, (2, len(part))) for part in parts]
        assert torch.equal(torch.cat(by_draw, dim=1).flatten(0, 1), whole.noise)
        assert torch.equal(torch.cat([part.observation.images for part in parts]), whole.observation.images)


def test_a_batch_that_cannot_be_shared(many, opened):
    with pytest.raises(
        ArgumentError, match=r"batch 6 cannot be shared by 4 processes in 1 parts each: .* multiple of 4"
    ):
        next(opened(many).steps(0, Share(0, 4, 1)))


def test_draws(many, opened):
    data = opened(many, settings={"batch": 25, "flow_draws": 40, "rtc_max_delay": 3, "rtc_offset": 0.3})
    batch = next(data.steps(0, Share()))[0]
    assert batch.noise.shape == (1000, 4, 4) and abs(batch.noise.mean()) < 0.05 and abs(batch.noise.std() - 1) < 0.02
    assert batch.time.min() >= 0.001 and batch.time.max() <= 1.0
    assert abs(batch.time.mean() - (0.6 * 0.999 + 0.001)) < 0.03  # Beta(1.5, 1) has mean 0.6
    assert set(batch.delay.tolist()) == {0, 1, 2, 3}
    given = batch.given.unflatten(0, (40, 25))
    moved = (given != batch.actions).flatten(2).any(dim=2).flatten()
    assert torch.equal(moved, batch.delay > 0)
    assert opened(many).tasks and next(opened(many).steps(0, Share()))[0].delay is None


def test_what_is_held_out_is_never_trained_on(many, opened):
    data = opened(many, settings={"steps": 20, "batch": 6, "held_out": 0.4})
    trained = {int(batch.row[at]) for batch, at in rows(data)}
    held = [int(row) for batch in data.held_out(Share()) for row in batch.row]
    assert len(held) == len(set(held)) and set(held) | trained == set(range(25)) and not set(held) & trained
    for one, other in zip(data.held_out(Share()), opened(many, settings={"held_out": 0.4, "batch": 6, "steps": 20},
                          workers=1).held_out(Share()), strict=True):  # fmt: skip
        same(one, other)
    shares = [list(data.held_out(Share(rank, 2))) for rank in range(2)]
    parts = [[int(row) for batch in share for row in batch.row] for share in shares]
    assert sorted(parts[0] + parts[1]) == sorted(held) and 0 <= len(parts[0]) - len(parts[1]) <= 1  # each once
    assert not list(opened(many).held_out(Share()))
    stats = data.recipe.stats[0]["actions"]
    assert stats.mean.tolist() != opened(many).recipe.stats[0]["actions"].mean.tolist()  # of what is trained on


def test_a_mixture_of_robots_and_texts(many, record_dataset, small_texts, opened, tmp_path):
    other = record_dataset(tmp_path / "arm", lengths=(5, 8), cameras=("front",))
    lines = []
    told = {"datasets": {"many_v21": {"state": ["observation.joints"], "cameras": {"left_wrist": "left_wrist"}}}}
    texts = small_texts
    data = opened(f"{many}:3", f"{other}:1", settings={"steps": 12, "batch": 8}, told=told, say=lines.append)
    assert any("many_v21 75 %, arm 25 %" in line for line in lines)
    assert any(line.startswith("many_v21 (as --map says)") for line in lines)
    assert any(line.startswith("arm (guessed") and "top = observation.images.front" in line for line in lines)
    assert data.names == ["many_v21", "arm"] and len(set(data.tasks)) == len(data.tasks) == 4
    for batch, at in rows(data):
        dims, source = int(batch.dims[at].sum()), int(batch.source[at])
        assert dims == (4, 3)[source] and batch.observation.camera_mask[at].tolist() == [True, source == 0]
        assert (batch.actions[at][:, dims:] == 0).all()
        if source:
            assert (batch.observation.images[at, 1] == 0).all() and data.tasks[batch.task[at]] in (
                "Reach the red target",
                "go home",
            )
    contracts = data.recipe.contracts
    assert [(one.state_dim, one.action_dim, one.control_hz) for one in contracts] == [(3, 4, 10), (3, 3, 25)]
    assert [[camera.key for camera in one.cameras] for one in contracts] == [["top", "left_wrist"], ["front", None]]
    with pytest.raises(DatasetError, match="no camera slot takes the picture 'hand'"):
        opened(many, texts)


def test_text_samples_in_the_same_batch(small_dataset, small_texts, opened):
    data = opened(f"{small_dataset}:1", f"{small_texts}:1", settings={"steps": 3, "batch": 8})
    assert data.names == ["dataset", "texts"] and data.tasks[-1] == "texts"
    kinds = set()
    for batch, at in rows(data):
        kinds.add(int(batch.kind[at]))
        if batch.kind[at] == TEXT:
            assert not batch.real[at].any() and not batch.dims[at].any() and (batch.actions[at] == 0).all()
            assert data.tasks[batch.task[at]] == "texts" and batch.observation.fast_mask[at].any()
            assert "samples.jsonl, line " in data.where(1, int(batch.row[at]))
    assert kinds == {ACTIONS, TEXT}
    counts = next(data.steps(0, Share()))[0].counts()
    assert counts[1] + counts[2] == 8 and counts[2] == 4
    with pytest.raises(ArgumentError, match="no dataset of actions"):
        opened(small_texts)


def test_texts_are_held_out_too(small_dataset, small_texts, opened):
    settings = {"steps": 6, "batch": 8, "held_out": 0.4}
    data = opened(f"{small_dataset}:1", f"{small_texts}:1", settings=settings)
    trained = {int(batch.row[at]) for batch, at in rows(data) if batch.kind[at] == TEXT}
    held = [
        int(row) for batch in data.held_out(Share()) for row, k in zip(batch.row, batch.kind, strict=True) if k == TEXT
    ]
    assert len(held) == 2 and set(held) | trained == set(range(5)) and not set(held) & trained
    assert data.facts()["data.texts.held_out"] == 2 and data.sizes()[1][1] == 3
    assert data.label(1, held[0]) == f"texts, line {held[0] + 1}"


def test_relative_actions(many, samples, opened):
    told = {"state": ["observation.joints", "observation.gripper"], "delta": [True, True, False]}
    data = opened(many, told=told, settings={"batch": 25})
    batch = next(data.steps(0, Share()))[0]
    chunks = []
    for at in range(25):
        row = int(batch.row[at])
        wanted = samples["action"][row] - np.append(samples["joints"][row][:2], [0, 0])
        np.testing.assert_allclose(data.unnormalize_actions(0, batch.actions[at].numpy()), wanted, atol=1e-5)
        chunks.append(wanted[~samples["action_is_pad"][row]])
    q99 = np.quantile(np.concatenate(chunks), 0.99, axis=0)
    np.testing.assert_allclose(data.recipe.stats[0]["actions"].q99[:3], q99[:3], atol=1e-6)
    assert data.recipe.contracts[0].delta_mask == (True, True, False)


def test_what_a_checkpoint_gets(many, opened, tmp_path):
    data = opened(many, settings={"rtc_max_delay": 2})
    data.save_assets(tmp_path / "out")
    contract = PolicyContract.load(tmp_path / "out" / "contract.json")
    assert (contract.robot, contract.action_horizon, contract.rtc_max_delay) == ("generic", 4, 2)
    assert contract.action_names == ("a", "b", "c", "grip") and contract.image_size == (8, 8)
    stats = read_norm_stats(tmp_path / "out" / "assets" / "norm_stats.json")
    assert stats["actions"].q99.tolist() == data.recipe.stats[0]["actions"].q99.tolist()


def test_facts_tell_other_data(many, opened, copy):
    first = opened(many).facts()
    assert first == opened(many).facts() and all(isinstance(value, int | float | str) for value in first.values())
    assert opened(many, settings={"held_out": 0.3}).facts() != first
    folder = copy("many_v21")
    assert opened(folder).facts() == first  # wherever it lies
    film = next(folder.rglob("*.mp4"))
    film.write_bytes(film.read_bytes() + bytes([0, 0, 0, 8]) + b"free")
    changed = {name for name, value in opened(folder).facts().items() if first[name] != value}
    assert changed == {"data.many_v21.files"}


def test_two_datasets_of_one_name(many, copy, opened):
    told = {"datasets": {name: {"state": "observation.joints"} for name in ("many_v21", "many_v21-2")}}
    assert opened(many, copy("many_v21"), told=told).names == ["many_v21", "many_v21-2"]
