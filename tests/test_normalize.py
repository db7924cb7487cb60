"""Normalisation against openpi's golden values and against the formulas written out."""

import json
from pathlib import Path

import numpy as np
import pytest

from ki_edge.errors import CheckpointError, ContractError, DatasetError
from ki_edge.policy.normalize import (
    NormStats,
    checked_stats,
    compute_stats,
    normalize,
    read_norm_stats,
    unnormalize,
    write_norm_stats,
)

STATS = NormStats(mean=[1.0, -2.0], std=[0.5, 0.0], q01=[0.0, 3.0], q99=[2.0, 3.0])
X = np.array([[0.5, 3.0], [4.0, 3.5]])


@pytest.mark.parametrize(
    ("kind", "epsilon", "expected"),
    [
        ("quantile", "openpi", (X - [0, 3]) / ([2 + 1e-6, 1e-6]) * 2 - 1),
        ("quantile", "lerobot", 2 * (X - [0, 3]) / [2, 1e-8] - 1),
        ("zscore", "openpi", (X - [1, -2]) / [0.5 + 1e-6, 1e-6]),
        ("zscore", "lerobot", (X - [1, -2]) / [0.5 + 1e-8, 1e-8]),
        ("none", "openpi", X),
    ],
)
def test_formulas(kind, epsilon, expected):
    rtol = 1e-7 if epsilon == "lerobot" else 1e-12  # LeRobot's arithmetic is float32
    np.testing.assert_allclose(normalize(X, STATS, kind, epsilon), expected, rtol=rtol)


@pytest.mark.parametrize(
    ("kind", "epsilon", "expected"),
    [
        ("quantile", "openpi", [(0.5 + 1) / 2 * (2 + 1e-6), (3 + 1) / 2 * 1e-6 + 3, 7.0]),
        ("quantile", "lerobot", [(0.5 + 1) / 2 * 2, (3 + 1) / 2 * 1e-8 + 3, 7.0]),
        ("zscore", "openpi", [0.5 * (0.5 + 1e-6) + 1, 3 * 1e-6 - 2, 7.0 * (1 + 1e-6)]),
        ("zscore", "lerobot", [0.5 * 0.5 + 1, -2.0, 7.0]),
        ("none", "openpi", [0.5, 3.0, 7.0]),
    ],
)
def test_inverse_and_passthrough(kind, epsilon, expected):
    np.testing.assert_allclose(unnormalize([0.5, 3.0, 7.0], STATS, kind, epsilon), expected, rtol=1e-14)


@pytest.mark.parametrize("kind", ["quantile", "zscore", "none"])
@pytest.mark.parametrize("group", ["droid", "droid_pos", "libero", "aloha", "libero_zscore"])
def test_round_trip_far_outside_the_quantiles(data, group, kind):
    stats = _golden_stats(data, group)["state"]
    x = np.random.default_rng(0).normal(size=(5, stats.dim)) * 100
    np.testing.assert_allclose(unnormalize(normalize(x, stats, kind), stats, kind), x, rtol=1e-9)


@pytest.mark.parametrize("group", ["droid", "droid_pos", "libero", "aloha", "libero_zscore"])
def test_golden_unnormalize(data, group):
    kind = "zscore" if group == "libero_zscore" else "quantile"
    golden = np.load(data / "transforms" / "vectors.npz")
    stats = _golden_stats(data, group)
    state = unnormalize(golden[f"{group}/model_in/state"], stats["state"], kind)
    actions = unnormalize(golden[f"{group}/model_actions"], stats["actions"], kind)
    np.testing.assert_allclose(state, golden[f"{group}/unnorm/state"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(actions, golden[f"{group}/unnorm/actions"], rtol=0, atol=1e-6)


def test_statistics_longer_than_the_data_are_truncated():
    np.testing.assert_array_equal(normalize(X[:, :1], STATS, "quantile"), normalize(X, STATS, "quantile")[:, :1])
    np.testing.assert_array_equal(unnormalize(X[:, :1], STATS, "zscore"), unnormalize(X, STATS, "zscore")[:, :1])


def test_input_is_left_alone():
    x = X.copy()
    normalize(x, STATS, "none")[:] = 0
    unnormalize(x, STATS, "quantile")[:] = 0
    np.testing.assert_array_equal(x, X)


def test_compute_stats():
    x = np.random.default_rng(1).normal(size=(30, 7, 3))
    stats, rows = compute_stats(x), x.reshape(-1, 3)
    np.testing.assert_allclose(stats.mean, rows.mean(0))
    np.testing.assert_allclose(stats.std, rows.std(0))
    np.testing.assert_allclose(stats.q01, np.quantile(rows, 0.01, axis=0))
    np.testing.assert_allclose(stats.q99, np.quantile(rows, 0.99, axis=0))


@pytest.mark.parametrize("bad", [np.zeros((0, 3)), np.zeros(3), np.array([[1.0, np.nan]])])
def test_compute_stats_refuses(bad):
    with pytest.raises(DatasetError, match="statistics need"):
        compute_stats(bad)


def test_file_round_trip(tmp_path: Path):
    write_norm_stats(tmp_path / "norm_stats.json", {"state": STATS, "actions": NormStats(mean=[0.0], std=[1.0])})
    content = json.loads((tmp_path / "norm_stats.json").read_text())
    assert content["norm_stats"]["actions"] == {"mean": [0.0], "std": [1.0], "q01": None, "q99": None}
    stats = read_norm_stats(tmp_path)
    np.testing.assert_array_equal(stats["state"].q99, STATS.q99)
    assert stats["actions"].q01 is None
    assert stats["state"].dim == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("{}", "must hold"),
        ('{"norm_stats": {"state": 3}}', "state must be an object"),
        ('{"norm_stats": {"state": {"mean": [1], "std": [1, 2]}}}', "one length"),
        ('{"norm_stats": {"state": {"mean": ["a"]}}}', r"norm_stats\.json: state\.mean\[0\] is 'a': expected a number"),
        ('{"norm_stats": {"state": {"mean": [0, true]}}}', r"state\.mean\[1\] is 'True': expected a number"),
        ('{"norm_stats": {"state": {"mean": [[1]]}}}', r"state\.mean\[0\] is '\[1\]': expected a number"),
        ('{"norm_stats": {"state": {"mean": "1"}}}', r"state\.mean is '1': expected a list"),
        ('{"norm_stats": {"state": {"mean": [0, NaN]}}}', r"state\.mean\[1\] is NaN: expected a finite number"),
        (
            '{"norm_stats": {"actions": {"q99": [1, -Infinity]}}}',
            r"actions\.q99\[1\] is -inf: expected a finite number",
        ),
        ('{"norm_stats": {"actions": {"std": [1e400]}}}', r"actions\.std\[0\] is inf: expected a finite number"),
        ('{"norm_stats": {"actions": {"std": [1e39]}}}', r"actions\.std\[0\] is 1e\+39: too large for float32"),
        ('{"norm_stats": {"actions": {"std": [0, -0.1]}}}', r"actions\.std\[1\] is -0\.1: expected 0 or more"),
        ('{"actions": {"q01": [0, 2], "q99": [0, 1]}}', r"actions\.q01\[1\] is 2 and q99\[1\] is 1, below it"),
        ('{"actions": {"q01": [-3e38], "q99": [3e38]}}', r"q01\[0\] is -3e\+38 and q99\[0\] is 3e\+38, further away"),
    ],
)
def test_broken_file(tmp_path: Path, content, message):
    (tmp_path / "norm_stats.json").write_text(content)
    with pytest.raises(ContractError, match=message):
        read_norm_stats(tmp_path)


def test_statistics_in_the_state_of_a_case_from_the_field(data: Path):
    """NaN among the statistics that a user's training wrote."""
    with pytest.raises(ContractError, match=r"norm_stats\.json: (state|actions)\.\w+\[\d+\] is NaN: expected a finite"):
        read_norm_stats(data / "norm_nan")


def test_dimensions_that_never_moved_are_right(tmp_path: Path):
    content = {"state": {"mean": [1.0, 1e-40], "std": [0.0, 1e-300], "q01": [1.0, 0.0], "q99": [1.0, 0.0]}}
    (tmp_path / "norm_stats.json").write_text(json.dumps(content))
    stats = read_norm_stats(tmp_path)["state"]
    for kind in ("quantile", "zscore"):
        for epsilon in ("openpi", "lerobot"):
            assert np.isfinite(unnormalize([0.5, -0.5], stats, kind, epsilon)).all()
            assert np.isfinite(normalize([1.0, 0.0], stats, kind, epsilon)).all()


def test_an_error_names_the_statistic_as_its_file_does():
    names, fields = {"q01": "min", "q99": "max"}, {"q01": np.array([0.0, 1.0]), "q99": np.array([1.0, np.nan])}
    with pytest.raises(
        CheckpointError, match=r"^state\.safetensors: action\.max\[1\] is NaN: expected a finite number"
    ):
        checked_stats(fields, "state.safetensors: action", names, CheckpointError)
    with pytest.raises(ContractError, match=r"norm stats: q99\[1\] is NaN"):
        NormStats(**fields)


def test_missing_file(tmp_path: Path):
    with pytest.raises(ContractError, match=r"norm_stats\.json"):
        read_norm_stats(tmp_path)


def test_wrong_use():
    with pytest.raises(ContractError, match="2 dimensions, the data 3"):
        normalize(np.zeros(3), STATS, "quantile")
    with pytest.raises(ContractError, match="needs q01 and q99"):
        normalize(np.zeros(1), NormStats(mean=[0.0], std=[1.0]), "quantile")
    with pytest.raises(ContractError, match="needs mean and std"):
        unnormalize(np.zeros(1), NormStats(q01=[0.0], q99=[1.0]), "zscore")
    with pytest.raises(ContractError, match="unknown normalization 'minmax'"):
        normalize(X, STATS, "minmax")
    with pytest.raises(ContractError, match="unknown epsilon"):
        unnormalize(X, STATS, "none", "jax")


def _golden_stats(data: Path, group: str) -> dict[str, NormStats]:
    content = json.loads((data / "transforms" / "norm_stats.json").read_text())[group]
    return {name: NormStats(**fields) for name, fields in content.items()}


def test_crossed_quantiles_that_were_accepted_are_read_again(tmp_path: Path) -> None:
    """LeRobot's q10 and q90 of a number that hardly moved: a bundle that has them can be loaded."""
    found = {"q01": np.array([0.0, 0.5]), "q99": np.array([1.0, 0.4])}
    stats = checked_stats(found, "state", {"q01": "q10", "q99": "q90"})
    write_norm_stats(tmp_path / "norm_stats.json", {"state": stats})
    assert read_norm_stats(tmp_path)["state"].q99.tolist() == [1.0, 0.4]
    with pytest.raises(ContractError, match="below it"):
        checked_stats(found, "state")
