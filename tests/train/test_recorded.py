"""Recorded episodes as training data: as LeRobot itself would give them to a training of its own."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from ki_edge.errors import ArgumentError, DatasetError
from ki_edge.model import Observation
from ki_edge.policy.contract import PolicyContract
from ki_edge.policy.images import fit_image
from ki_edge.policy.normalize import read_norm_stats
from ki_edge.train import cli, recorded
from ki_edge.train.recorded import chunks_of, decode_recordings
from ki_edge.train.run import PICTURES, open_trainer
from ki_edge.train.step.settings import TrainSettings
from ki_runtime.robots.replay import record_episode

for package in ("pyarrow", "av"):
    pytest.importorskip(package, reason="pip install 'ki-edge[record]'")
SIZE = (8, 8)
QUICK = TrainSettings(steps=4, batch=6, warmup=2, save_every=2, log_every=1, flow_draws=2)


@pytest.fixture
def dataset(data, tmp_path):
    return shutil.copytree(data / "lerobot_dataset" / "v3", tmp_path / "dataset")


@pytest.fixture(scope="module")
def samples(data):
    """Of every frame, as LeRobot's own reader gave them for chunks of four."""
    with np.load(data / "lerobot_dataset" / "samples.npz") as file:
        return dict(file)


def test_every_frame_is_what_lerobot_would_train_on(dataset, samples, tmp_path):
    seen = []
    found = decode_recordings(
        dataset, tmp_path / "p.npy", horizon=4, size=SIZE, progress=lambda done, of: seen.append((done, of))
    )
    np.testing.assert_array_equal(found.actions, samples["action"])
    np.testing.assert_array_equal(found.real, ~samples["action_is_pad"])
    np.testing.assert_array_equal(found.state, samples["state"])
    assert [found.meta["prompts"][i] for i in found.prompt] == samples["task"].tolist()
    assert found.meta["cameras"] == ["front", "wrist"] and found.meta["control_hz"] == 10
    assert (found.meta["state_names"], found.meta["action_names"]) == (["a", "b", "c"], ["x", "y"])
    assert found.images.shape == (12, 2, *SIZE, 3) and seen == [(n, 12) for n in range(1, 13)]
    for camera, name in enumerate(("front", "wrist")):
        for frame, picture in enumerate(samples[name].transpose(0, 2, 3, 1)):
            wanted = fit_image(np.ascontiguousarray(picture), *SIZE, "pil_pad")
            assert np.abs(found.images[frame, camera].astype(int) - wanted).max() <= 1  # another decoder of AV1


def test_statistics_count_each_action_once(dataset, tmp_path):
    found = decode_recordings(dataset, tmp_path / "p.npy", horizon=4, size=SIZE)
    each = np.concatenate([[[10 * t + e, -t] for t in range(n)] for e, n in enumerate((7, 5))])
    np.testing.assert_array_equal(found.each_action, each)


@pytest.mark.parametrize("horizon", [1, 3, 9])
def test_a_chunk_is_held_at_its_episodes_end(horizon):
    actions = np.arange(10, dtype=np.float32).reshape(5, 2)
    chunks, real = chunks_of(actions, horizon)
    for t in range(5):
        for i in range(horizon):
            np.testing.assert_array_equal(chunks[t, i], actions[min(t + i, 4)])
            assert real[t, i] == (t + i <= 4)


def observation(config, batch):
    random = np.random.default_rng(0)
    shape = (batch, 2, config.vision.image_size, config.vision.image_size, 3)
    tokens = torch.from_numpy(random.integers(4, 60, (batch, 5)))
    images = torch.from_numpy(random.integers(0, 256, shape, np.uint8))
    return Observation(images, torch.ones(batch, 2, dtype=torch.bool), tokens, torch.ones(batch, 5, dtype=torch.bool))


def test_nothing_is_learnt_from_what_was_not_recorded(small_config):
    """The loss is the mean over real actions, and none of its gradient comes from the others."""
    from ki_edge.model import Pi05

    torch.manual_seed(0)
    config = replace(small_config, action_horizon=4)
    model, random = Pi05(config), torch.Generator().manual_seed(1)
    actions = torch.randn(2, 4, config.action_dim, generator=random)
    noise, time = torch.randn(6, 4, config.action_dim, generator=random), torch.rand(6, generator=random)
    real = torch.tensor([[True, True, False, False], [True, True, True, True]])
    arguments = {"noise": noise, "time": time, "delay": torch.tensor([1, 0, 0, 0, 2, 1])}
    whole = model.compute_loss(observation(config, 2), actions, **arguments)
    found = model.compute_loss(observation(config, 2), actions, real=real, **arguments)
    kept = whole.free.numpy() & np.tile(real.numpy(), (3, 1))
    np.testing.assert_array_equal(found.free.numpy(), kept)
    flow = whole.flow.detach().numpy()
    np.testing.assert_array_equal(found.flow.detach().numpy(), np.where(kept[..., None], flow, 0.0))
    assert found.mean_flow(3).item() == pytest.approx(flow[..., :3][kept].mean(), rel=1e-6)
    none = model.compute_loss(observation(config, 2), actions, real=torch.zeros(2, 4, dtype=torch.bool), **arguments)
    assert none.mean_flow(3).item() == 0.0
    for wrong in (torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 4)):
        with pytest.raises(ArgumentError, match=r"real: .* expected torch.bool \[2, 4\]"):
            model.compute_loss(observation(config, 2), actions, real=wrong, **arguments)


def test_a_run_on_recorded_episodes_and_its_resumption(dataset, small_config, tmp_path):
    whole = open_trainer(dataset, tmp_path / "whole", small_config, QUICK, horizon=4)
    records = list(whole.run())
    assert all(np.isfinite(record["flow"]) and np.isfinite(record["fast"]) for record in records)
    contract = PolicyContract.load(tmp_path / "whole" / "contract.json")
    assert (contract.action_horizon, contract.control_hz, contract.action_names) == (4, 10, ("x", "y"))
    assert [camera.key for camera in contract.cameras] == ["front", "wrist"]
    stats = read_norm_stats(tmp_path / "whole" / "assets" / "norm_stats.json")
    assert stats["actions"].q99[0] == pytest.approx(np.quantile(EACH_X, 0.99))

    cut = open_trainer(dataset, tmp_path / "cut", small_config, QUICK, horizon=4)
    next(iter(cut.run())), cut.save()
    again = open_trainer(dataset, tmp_path / "cut", small_config, QUICK, horizon=4, resume=True)
    assert [record["flow"] for record in again.run()] == [record["flow"] for record in records[1:]]
    change(dataset / "meta" / "info.json", fps=20)
    with pytest.raises(ArgumentError, match="control_hz of the demonstrations: the run has 10"):
        open_trainer(dataset, tmp_path / "cut", small_config, QUICK, horizon=4, resume=True)


EACH_X = [10 * t + e for e, n in enumerate((7, 5)) for t in range(n)]


def change(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_episodes_in_npz_files(tmp_path, small_config):
    (tmp_path / "episodes").mkdir()
    for number in range(2):
        record_episode(
            tmp_path / "episodes" / f"{number}.npz",
            images={"front": np.full((5, 10, 12, 3), 40 * number, np.uint8)},
            state=np.full((5, 3), number, np.float32),
            actions=np.arange(10, dtype=np.float32).reshape(5, 2),
            prompt="fold",
        )
    found = decode_recordings(tmp_path / "episodes", tmp_path / "p.npy", horizon=3, size=SIZE)
    assert len(found) == 10 and found.meta["action_names"] == ["action 0", "action 1"]
    assert found.meta["control_hz"] is None and found.real.sum() == 2 * (3 * 3 + 2 + 1)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"most_bytes": 100}, r"the pictures take 0\.0 GB at the model's size, at most 0\.0 GB are decoded"),
        ({"horizon": 0}, "horizon"),
    ],
)
def test_what_is_refused(dataset, small_config, tmp_path, options, line):
    arguments = {"horizon": 4, **options}
    with pytest.raises((DatasetError, ArgumentError), match=line):
        if "most_bytes" in options:
            decode_recordings(dataset, tmp_path / "p.npy", size=SIZE, **arguments)
        else:
            open_trainer(dataset, tmp_path / "out", small_config, QUICK, **arguments)
    assert not (tmp_path / "p.npy").exists() and not (tmp_path / "out" / "training" / PICTURES).exists()


def test_a_full_disk_is_told_before_anything_is_decoded(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(recorded.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(DatasetError, match="GB free; the pictures take"):
        decode_recordings(dataset, tmp_path / "p.npy", horizon=4, size=SIZE)
    assert list(tmp_path.iterdir()) == [dataset]


def test_a_picture_that_cannot_be_read_leaves_no_half_of_them(dataset, tmp_path):
    film = next((dataset / "videos").rglob("*.mp4"))
    film.write_bytes(film.read_bytes()[: film.stat().st_size // 2])
    with pytest.raises(DatasetError, match="cannot be read"):
        decode_recordings(dataset, tmp_path / "made" / "p.npy", horizon=4, size=SIZE)
    assert not list(tmp_path.rglob("*.npy*"))


def test_the_command(dataset, tmp_path, capsys):
    arguments = [str(dataset), "-o", str(tmp_path / "out"), "--steps", "1", "--batch", "4", "--horizon", "5"]
    assert cli.main([*arguments, "--threads", "1"]) == 0
    assert PolicyContract.load(tmp_path / "out" / "contract.json").action_horizon == 5
    assert cli.main([str(tmp_path / "nothing"), "-o", str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "nothing: no such file or folder; expected an episode" in error
