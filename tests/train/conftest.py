"""Small recorded data, and a model small enough to train in a test."""

import json
from pathlib import Path

import numpy as np
import pytest

from ki_edge.config import GemmaConfig, Pi05Config, VisionConfig


@pytest.fixture(scope="session")
def small_config():
    """Widths and depths; vocabulary and horizon follow from the data."""
    return Pi05Config(
        vision=VisionConfig(width=16, depth=1, mlp_dim=16, num_heads=2, patch_size=4, image_size=8),
        backbone=GemmaConfig(width=24, depth=2, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8),
        expert=GemmaConfig(width=16, depth=2, mlp_dim=24, num_heads=2, num_kv_heads=1, head_dim=8),
        vocab_size=64,
        action_dim=4,
        action_horizon=1,
    )


CAMERAS, NUMBERS = ("top", "hand"), ("x", "y", "z")
TASKS = ("Reach the red target", "go home")
ANSWERS = "<loc{:04d}><loc{:04d}>"


def record_lerobot(folder, *, lengths=(6, 4, 7, 5), size=16, fps=25, seed=0, cameras=CAMERAS, tasks=TASKS):
    """A LeRobotDataset v3.0 by the recorder of `ki-run --record`: two cameras, three numbers, an episode a length.

    States wander; an action is the state of the next frame, a quarter higher. Every other episode has the other task.
    """
    from ki_runtime.recording.dataset import DatasetWriter
    from ki_runtime.recording.features import Features, Frame

    random = np.random.default_rng(seed)
    features = Features(float(fps), "test", 3, NUMBERS, dict.fromkeys(cameras, (size, size)), ("position",))
    writer = DatasetWriter(Path(folder), features)
    for number, length in enumerate(lengths):
        writer.begin()
        state = random.uniform(-2.0, 2.0, 3) + np.cumsum(random.normal(0.0, 0.2, (length + 1, 3)), axis=0)
        for tick in range(length):
            pictures = {name: random.integers(0, 256, (size, size, 3), np.uint8) for name in cameras}
            action = np.float32(state[tick + 1] + 0.25)
            writer.add(Frame(
                tick, tick / fps, np.float32(state[tick]), action, action, pictures,
                0.0, 0, tick, 0.0, False, (), tasks[number % len(tasks)],
            ))  # fmt: skip
        writer.finish({"ki.stopped": False})
    return Path(folder)


def write_texts(folder, *, count=5, size=16, seed=0, cameras=CAMERAS):
    """A text set of `count` samples: a question about two pictures each, answered by a place, and one in words."""
    from PIL import Image

    random = np.random.default_rng(seed)
    folder = Path(folder)
    (folder / "pictures").mkdir(parents=True)
    lines = []
    for at in range(count):
        image = {}
        for name in cameras:
            image[name] = f"pictures/{at:03d}_{name}.png"
            Image.fromarray(random.integers(0, 256, (size, size, 3), np.uint8)).save(folder / image[name])
        places = "".join(ANSWERS.format(*random.integers(0, 1024, 2)) for _ in cameras)
        lines.append({"image": image, "question": "point to the target", "answer": places})
    lines[-1] |= {"question": "what is in the picture?", "answer": "a red ball"}
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def record_dataset():
    """record_dataset(folder, lengths=(6, 4, 7, 5), size=16, ...) -> a new LeRobotDataset, see `record_lerobot`."""
    pytest.importorskip("pyarrow", reason="pip install 'ki-edge[record]'")
    pytest.importorskip("av", reason="pip install 'ki-edge[record]'")
    return record_lerobot


@pytest.fixture(scope="session")
def small_dataset(record_dataset, tmp_path_factory):
    """Four episodes, 22 frames, that tests share and must not change."""
    return record_dataset(tmp_path_factory.mktemp("train") / "dataset")


@pytest.fixture(scope="session")
def write_text_set():
    """write_text_set(folder, count=5, size=16, ...) -> a new text set, see `write_texts`."""
    return write_texts


@pytest.fixture(scope="session")
def small_texts(tmp_path_factory):
    """Five text samples that tests share and must not change."""
    return write_texts(tmp_path_factory.mktemp("train") / "texts")
