"""The flow-matching clock against recorded runs of openpi and LeRobot."""

import math
from dataclasses import replace

import numpy as np
import pytest

from ki_edge import flow
from ki_edge.config import PI05
from ki_edge.errors import ArgumentError
from ki_edge.files.safetensors_index import SafetensorsIndex
from ki_edge.model import load_model

DEPTH = 3  # of the recorded models
CONFIG = replace(  # as far as it matters here: the expert's width and depth
    PI05, backbone=replace(PI05.backbone, depth=DEPTH), expert=replace(PI05.expert, width=32, depth=DEPTH)
)


@pytest.fixture(scope="module")
def recorded(data):
    return dict(np.load(data / "openpi_a" / "outputs.npz"))


@pytest.fixture(scope="module")
def tensor(data):
    return SafetensorsIndex(data / "openpi_a" / "model.safetensors").array


@pytest.mark.parametrize(("convention", "folder"), [("openpi", "openpi_a"), ("lerobot", "lerobot_a")])
def test_times_are_the_recorded_ones(data, convention, folder):
    times = flow.denoise_times(10, convention)
    assert times.dtype == np.float32
    np.testing.assert_array_equal(times, np.load(data / folder / "outputs.npz")["times"])


def test_conventions_differ_by_rounding():
    openpi, lerobot = flow.denoise_times(10), flow.denoise_times(10, "lerobot")
    assert 0 < np.abs(openpi - lerobot).max() < 3e-7


@pytest.mark.parametrize("convention", flow.TIME_CONVENTIONS)
@pytest.mark.parametrize("steps", [1, 2, 7, 10, 50, 1000])
def test_any_number_of_steps(convention, steps):
    times = flow.denoise_times(steps, convention)
    assert times.shape == (steps,)
    assert times[0] == 1
    np.testing.assert_allclose(times, 1 - np.arange(steps) / steps, atol=1e-4)
    assert flow.step_size(steps) == np.float32(-1 / steps)


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.0, "10", None, True])
def test_wrong_number_of_steps(steps):
    for function in (flow.denoise_times, flow.step_size, flow.check_steps):
        with pytest.raises(ArgumentError, match=r"num_steps .*: expected an integer from 1 to 1000"):
            function(steps)


def test_numpy_integers_are_integers():
    assert len(flow.denoise_times(np.int64(4))) == 4


def test_wrong_convention():
    with pytest.raises(ArgumentError, match="time convention 'pi': expected one of openpi, lerobot"):
        flow.denoise_times(10, "pi")


def test_sines_are_the_recorded_ones(recorded):
    embedding = flow.sincos_embedding(recorded["times"], 32)
    assert embedding.dtype == np.float64
    np.testing.assert_allclose(embedding.astype(np.float32), recorded["time_sincos_steps"][:, 0], rtol=0, atol=1e-7)


def test_sines_are_exact_at_large_angles():
    """At width 1024 the first angle is 2 pi t / 0.004, up to 1571 rad: no float32 may touch it."""
    times = np.array([1.0, 0.9, 0.001], np.float32)
    ours = flow.sincos_embedding(times, 1024)
    for row, t in enumerate(times):
        for k in (0, 1, 255, 511):
            angle = 2 * math.pi * float(t) / (0.004 * 1000 ** (k / 511))
            assert ours[row, k] == pytest.approx(math.sin(angle), abs=1e-11)
            assert ours[row, 512 + k] == pytest.approx(math.cos(angle), abs=1e-11)


def test_modulations_follow_from_the_recorded_conditions(recorded, tensor):
    """Rows in order of use: two norms a layer, then the final one; each the recorded condition through its layer."""
    table = flow.modulation_table(tensor, recorded["times"], CONFIG)
    assert table.dtype == np.float32
    assert table.shape == (10, 2 * DEPTH + 1, 3 * 32)
    condition = recorded["adarms_cond_steps"][:, 0].astype(np.float64)
    expert = "paligemma_with_expert.gemma_expert.model."
    names = [
        expert + name
        for layer in range(DEPTH)
        for name in (f"layers.{layer}.input_layernorm", f"layers.{layer}.post_attention_layernorm")
    ]
    for row, name in enumerate([*names, expert + "norm"]):
        expected = condition @ tensor(f"{name}.dense.weight").T + tensor(f"{name}.dense.bias")
        np.testing.assert_allclose(table[:, row], expected, rtol=0, atol=1e-5)


def test_modulations_equal_the_models(data, recorded, tensor):
    import torch

    with torch.no_grad():
        expected = load_model(data / "openpi_a").modulation(torch.from_numpy(recorded["times"]))
    ours = flow.modulation_table(tensor, recorded["times"], CONFIG)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)


def test_names_of_what_the_table_reads(tensor):
    read = []

    def remember(name):
        read.append(name)
        return tensor(name)

    flow.modulation_table(remember, flow.denoise_times(1), CONFIG)
    assert set(read) == set(flow.modulation_weights(CONFIG))
    assert len(flow.modulation_weights(CONFIG)) == 2 * (2 + 2 * DEPTH + 1)


def test_the_row_of_a_pi0_is_the_embedding_of_the_time(recorded):
    """Nothing is read: its layers are in the graph."""
    config = replace(CONFIG, variant="pi0")
    table = flow.modulation_table({}.__getitem__, recorded["times"], config)
    assert (table.dtype, table.shape) == (np.float32, (10, *config.modulation_shape))
    np.testing.assert_allclose(table, recorded["time_sincos_steps"], rtol=0, atol=1e-7)
    assert flow.modulation_weights(config) == {}
