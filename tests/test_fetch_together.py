"""Episodes of the Fetch evaluation side by side: every thread gets its own row of one batch."""

import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "fetch"


@pytest.fixture
def evaluate(monkeypatch):
    """The script, whose neighbours it finds beside itself."""
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location("fetch_evaluate", FOLDER / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def together(evaluate):
    """The file of several robots at the same time."""
    return sys.modules["together"]


def asked(number):
    """Inputs whose prompt is as long as the number, and noise that carries it."""
    images, mask = np.full((1, 1, 2, 2, 3), number, np.uint8), np.ones((1, 1), bool)
    prompt = np.full((1, number), number)
    return (images, mask, prompt, np.ones((1, number), bool)), {"noise": np.full((1, 2, 3), float(number))}


def test_every_thread_gets_its_own_row(together):
    batches = []

    def sample(images, mask, prompt, prompt_mask, *, noise, num_steps):
        batches.append(len(images))
        assert prompt.shape == prompt_mask.shape and (prompt_mask.sum(1) == prompt[:, 0]).all()
        return noise + images[:, 0, :, :1, 0]

    batch = together.Together(sample, 3)

    def run(number):
        found = []
        for _ in range(number):  # threads that end early do not hold up the others
            inputs, given = asked(number)
            found.append(batch(*inputs, **given))
        batch.leave()
        return found

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(run, (1, 2, 4)))
    for number, found in zip((1, 2, 4), results, strict=True):
        assert len(found) == number
        assert all(row.shape == (1, 2, 3) and (row == 2 * number).all() for row in found)
    assert sum(batches) == 7 and batches == [3, 2, 1, 1]


def test_an_error_reaches_every_thread(together):
    def sample(*_, **__):
        raise ValueError("no")

    batch = together.Together(sample, 2)

    def run(number):
        inputs, given = asked(number)
        with pytest.raises(ValueError, match="no"):
            batch(*inputs, **given)
        batch.leave()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, (1, 2)))


def test_wilson_intervals_are_those_of_the_textbook(evaluate):
    low, high = evaluate.wilson(0.99, 100)
    assert (low, high) == pytest.approx((0.9455, 0.9982), abs=1e-4)
    assert evaluate.wilson(1.0, 100) == pytest.approx((0.9630, 1.0), abs=1e-4)
    assert evaluate.wilson(0.0, 10)[0] == 0.0
