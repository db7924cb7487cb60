"""Observations for the range audit: built-in ones, and recorded ones that fit or are refused."""

from dataclasses import replace

import numpy as np
import pytest

import ki_export.exporter
from ki_edge.checkpoints import Checkpoint
from ki_edge.config import TINY
from ki_edge.errors import DatasetError
from ki_edge.policy.prompt import PromptTokenizer
from ki_export.exporter import export
from ki_export.options import ExportOptions
from ki_export.policies import PolicyRequest
from ki_export.precision.calibration import Calibration, calibration
from ki_export.precision.rehearsal import _prefix_feed
from ki_runtime.robots.replay import record_episode

from .complete import read_policy


@pytest.fixture(scope="module")
def policy(checkpoint):
    opened = Checkpoint.open(checkpoint)
    files = read_policy(opened.path, opened.format, opened.settings, opened.config, PolicyRequest())
    tokenizer = PromptTokenizer(checkpoint / "assets" / "tokenizer.model", files.contract.prompt_format, 64)
    return opened.config, replace(files, contract=replace(files.contract, max_token_len=64), tokenizer=tokenizer)


def test_built_in_observations_differ_and_fit_the_policy(policy):
    config, files = policy
    found = calibration(config, files, None)
    assert len(found.observations) == 8 and "synthetic" in found.source
    assert len({one.images.tobytes() for one in found.observations}) == 8
    for one in found.observations:
        assert one.images.dtype == np.uint8 and 1 <= one.images.shape[1] <= len(files.contract.cameras)
        assert one.prompt_tokens.shape[1] <= files.contract.max_token_len


def test_recorded_episodes_pass_through_the_policys_pipeline(policy, tmp_path):
    config, files = policy
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        pictures = {camera: rng.integers(0, 256, (20, 14, 14, 3)).astype(np.uint8) for camera in ("left", "right")}
        record_episode(
            tmp_path / f"{name}.npz",
            images=pictures,
            state=rng.uniform(-1, 1, (20, 2)).astype(np.float32),
            actions=rng.uniform(-1, 1, (20, 2)).astype(np.float32),
            prompt="go",
        )
    found = calibration(config, files, tmp_path)
    assert isinstance(found, Calibration) and found.source.startswith("recorded: 32 observations of 2 files")
    assert all(one.images.shape == (1, 2, 14, 14, 3) for one in found.observations)
    one = calibration(config, files, tmp_path / "one.npz")
    assert len(one.observations) == 20


def test_recorded_model_inputs_serve_too(policy, tmp_path):
    config, _ = policy
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "inputs.npz",
        **{"image/a": rng.integers(0, 256, (2, 14, 14, 3)).astype(np.uint8), "image_mask/a": np.ones(2, bool)},
        tokenized_prompt=np.array([[5, 6, 7], [5, 6, 0]]),
        tokenized_prompt_mask=np.array([[True] * 3, [True, True, False]]),
    )
    found = calibration(config, None, tmp_path / "inputs.npz")
    assert [one.prompt_tokens.shape[1] for one in found.observations] == [3, 2]


def test_recordings_without_usable_observations_are_refused(policy, tmp_path):
    config, files = policy
    with pytest.raises(DatasetError, match=r"neither meta/info\.json nor an \.npz file in this folder"):
        calibration(config, files, tmp_path)
    with pytest.raises(DatasetError, match="no such file"):
        calibration(config, files, tmp_path / "missing.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(DatasetError, match=r"other\.npz"):
        calibration(config, files, tmp_path / "other.npz")
    wrong = {"image/a": np.zeros((1, 9, 9, 3), np.uint8), "image_mask/a": np.ones(1, bool)}
    np.savez(
        tmp_path / "size.npz",
        **wrong,
        tokenized_prompt=np.ones((1, 2), int),
        tokenized_prompt_mask=np.ones((1, 2), bool),
    )
    with pytest.raises(DatasetError, match=r"'image/a' is uint8\[1, 9, 9, 3\], expected uint8\[1, 14, 14, 3\]"):
        calibration(config, files, tmp_path / "size.npz")


GOOD = {
    "image/a": np.zeros((2, 14, 14, 3), np.uint8),
    "image_mask/a": np.ones(2, bool),
    "tokenized_prompt": np.ones((2, 3), np.int64),
    "tokenized_prompt_mask": np.ones((2, 3), bool),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({name: value[:0] for name, value in GOOD.items()}, "it holds none"),
        ({"image/a": GOOD["image/a"].astype(np.float32)}, "'image/a' is float32"),
        ({"image/a": GOOD["image/a"][:1]}, r"'image/a' is uint8\[1, 14, 14, 3\], expected uint8\[2"),
        ({"tokenized_prompt": -GOOD["tokenized_prompt"]}, "ids outside the vocabulary"),
        ({"tokenized_prompt": GOOD["tokenized_prompt"] + 1000}, "ids outside the vocabulary of 640"),
        ({"tokenized_prompt": GOOD["tokenized_prompt"][0]}, "expected integers"),
        ({"tokenized_prompt": np.full((2, 3), "x")}, "expected integers"),
        ({"tokenized_prompt_mask": np.zeros((2, 3), bool)}, "a row without a token"),
        ({"image_mask/a": np.ones((2, 1), bool)}, "'image_mask/a' is bool"),
    ],
)
def test_recorded_model_inputs_are_checked(policy, tmp_path, change, message):
    config, _ = policy
    np.savez(tmp_path / "inputs.npz", **{**GOOD, **change})
    with pytest.raises(DatasetError, match=f"no usable observation: .*{message}"):
        calibration(config, None, tmp_path / "inputs.npz")


def test_padding_behind_a_prompt_is_audited_too():
    """Engines compute padded tokens, and an infinity in their V reaches every row as 0 * inf."""
    observed = next(iter(calibration(TINY, None, None, synthetic=1).observations))
    feed = _prefix_feed(observed)
    assert feed["prompt_mask"].sum() == observed.prompt_tokens.size < feed["prompt_tokens"].numel()
    assert not feed["prompt_tokens"][~feed["prompt_mask"]].any()


@pytest.mark.parametrize("names", [("images/", "state"), ("", "observation/state")])
def test_an_episode_of_a_libero_robot_calibrates_its_policy(policy, tmp_path, names):
    """In the form of the policy's contract, whatever the recording calls things."""
    config, files = policy
    keys = ("observation/image", "observation/wrist_image")
    cameras = tuple(replace(camera, key=key) for camera, key in zip(files.contract.cameras, keys, strict=True))
    files = replace(files, contract=replace(files.contract, robot="libero", cameras=cameras))
    rng = np.random.default_rng(0)
    numbers = rng.uniform(-1, 1, (6, 2)).astype(np.float32)
    pictures = {f"{names[0]}{key}": rng.integers(0, 256, (6, 14, 14, 3), dtype=np.uint8) for key in keys}
    np.savez(tmp_path / "a.npz", **pictures, **{names[1]: numbers}, actions=numbers, prompt=np.array("go"))
    found = calibration(config, files, tmp_path / "a.npz")
    assert len(found.observations) == 6
    np.testing.assert_array_equal(found.observations[2].images[0, 1], pictures[f"{names[0]}{keys[1]}"][2])
    np.savez(tmp_path / "b.npz", **{names[1]: numbers}, actions=numbers, prompt=np.array("go"))
    with pytest.raises(
        DatasetError, match=r"^--calibrate: .*b\.npz: images/<camera> is missing, found actions float32"
    ):
        calibration(config, files, tmp_path / "b.npz")


@pytest.mark.parametrize("content", [b"hello", b""])
def test_an_unfit_recording_is_told_before_anything_is_traced(checkpoint, tmp_path, monkeypatch, content):
    def traced(*_):
        raise AssertionError("tracing began")

    monkeypatch.setattr(ki_export.exporter, "trace_all", traced)
    (tmp_path / "bad.npz").write_bytes(content)
    options = ExportOptions(target="trt", precision="fp16", calibrate=tmp_path / "bad.npz")
    with pytest.raises(DatasetError, match=r"^--calibrate: .*bad\.npz: no \.npz file of arrays that can be read"):
        export(str(checkpoint), tmp_path / "bundle", options)
    assert not (tmp_path / "bundle").exists()
    options = replace(options, calibrate=tmp_path / "none.npz")
    with pytest.raises(DatasetError, match=r"^--calibrate: .*none\.npz: no such file"):
        export(str(checkpoint), tmp_path / "bundle", options)
