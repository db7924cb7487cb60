"""Recorded episodes in the form of every contract, through the policy's own input pipeline."""

import os

import numpy as np
import pytest

from ki_edge.errors import DatasetError
from ki_edge.policy.contract import Camera, aloha, droid, generic, libero
from ki_edge.policy.normalize import NormStats
from ki_edge.policy.prompt import PromptTokenizer
from ki_edge.policy.transforms import InputPipeline, read_images, read_state
from ki_edge.recordings.episode_file import RecordedEpisode
from ki_edge.recordings.episodes import EpisodeView

T = 3
RNG = np.random.default_rng(0)
STATE, ACTIONS = RNG.normal(size=(T, 8)).astype(np.float32), RNG.normal(size=(T, 8)).astype(np.float32)
PICTURES = RNG.integers(0, 256, (2, T, 6, 8, 3), dtype=np.uint8)
DROID = ("observation/exterior_image_1_left", "observation/wrist_image_left")
LIBERO = ("observation/image", "observation/wrist_image")
COMMON = {"actions": ACTIONS, "prompt": np.array("grab it")}
PARTS = {"observation/joint_position": STATE[:, :7], "observation/gripper_position": STATE[:, 7]}
LEROBOT = {"observation.images.front": PICTURES[0], "observation.images.wrist": PICTURES[1], "observation.state": STATE,
           "action": ACTIONS, "task": np.array("grab it")}  # fmt: skip


def named(names, prefix="images/", **more):
    return {f"{prefix}{name}": pictures for name, pictures in zip(names, PICTURES, strict=True)} | COMMON | more


def arms():
    """ALOHA's: 14 numbers, and pictures as its own environment gives them, channels first."""
    wide = np.concatenate([STATE, STATE[:, :6]], axis=1)
    names = ("cam_high", "cam_left_wrist")
    pictures = {name: array.transpose(0, 3, 1, 2) for name, array in zip(names, PICTURES, strict=True)}
    return {**pictures, "state": wide, "actions": wide, "prompt": np.array("grab it")}


FRONT = generic(["front", "wrist"], state_dim=8, action_dim=8, action_horizon=4)
SLOTS = [Camera("base_0_rgb", "top/front"), Camera("left_wrist_0_rgb", "hand/front")]
FORMS = {
    "droid, generic names": (droid(), DROID, named(DROID, state=STATE)),
    "droid, its own keys": (droid(), DROID, named(DROID, "", **PARTS)),
    "droid, gripper [T, 1]": (
        droid(),
        DROID,
        named(DROID, "", **PARTS | {"observation/gripper_position": STATE[:, 7:]}),
    ),
    "droid, short names": (droid(), DROID, named(["exterior_image_1_left", "wrist_image_left"], state=STATE)),
    "droid, the model's slots": (droid(), DROID, named(["base_0_rgb", "left_wrist_0_rgb"], state=STATE)),
    "libero, generic names": (libero(action_dim=8), LIBERO, named(LIBERO, state=STATE)),
    "libero, its own keys": (libero(action_dim=8), LIBERO, named(LIBERO, "", **{"observation/state": STATE})),
    "aloha, channels first": (aloha(), ("cam_high", "cam_left_wrist"), arms()),
    "generic": (FRONT, ("front", "wrist"), named(("front", "wrist"), state=STATE)),
    "generic, float64": (FRONT, ("front", "wrist"), named(("front", "wrist"), state=STATE.astype(np.float64))),
    "generic, LeRobot's keys": (FRONT, ("front", "wrist"), LEROBOT),
    "keys that end alike": (
        generic(SLOTS, state_dim=8, action_dim=8, action_horizon=4),
        ("top/front", "hand/front"),
        named(["top/front", "hand/front"], state=STATE),
    ),
    "a camera that DROID does not use": (
        droid(),
        DROID,
        named(DROID, state=STATE) | {"images/observation/exterior_image_2_left": PICTURES[0]},
    ),
}


def saved(folder, arrays):
    np.savez(folder / "episode.npz", **arrays)
    return folder / "episode.npz"


@pytest.mark.parametrize(("contract", "cameras", "arrays"), FORMS.values(), ids=FORMS)
def test_every_form_is_that_of_the_contract(tmp_path, contract, cameras, arrays):
    episode = RecordedEpisode.open(saved(tmp_path, arrays))
    view = EpisodeView(episode, contract)
    assert len(view) == T
    for step in range(T):
        observation = view.observation(step)
        np.testing.assert_array_equal(read_state(contract, observation)[:8], STATE[step])
        images, mask = read_images(contract, observation)
        slots = [camera.key for camera in contract.cameras]
        assert [key for key, there in zip(slots, mask, strict=True) if there] == list(cameras)
        pictures = observation.get("images", observation)
        for key, array in zip(cameras, PICTURES, strict=True):
            picture = pictures[key]
            np.testing.assert_array_equal(picture if picture.shape[2] == 3 else picture.transpose(1, 2, 0), array[step])
        assert all(picture.shape == (6, 8, 3) for picture in view.pictures(step)) and images.any()
        assert observation["prompt"] == "grab it" and view.observation(step, "mine")["prompt"] == "mine"


def test_a_case_from_the_field(data, tokenizer_model):
    """A DROID policy and an episode that was recorded under generic names."""
    episode = RecordedEpisode.open(data / "droid_replay" / "ep.npz")
    stats = {"state": NormStats(q01=np.full(8, -1.0), q99=np.ones(8))}
    pipeline = InputPipeline(droid(), stats, PromptTokenizer(tokenizer_model, "pi05", 200))
    inputs = pipeline(EpisodeView(episode, droid()).observation(11))
    assert inputs.camera_mask.tolist() == [True, True, False]
    np.testing.assert_array_equal(inputs.raw_state, episode.state[11])


UNFIT = {
    "camera": (named(["front", "wrist"], state=STATE), "no pictures of camera observation/exterior_image_1_left"),
    "unknown": (
        named(DROID, state=STATE) | {"images/ceiling": PICTURES[0]},
        "pictures of ceiling, a camera that the policy does not have",
    ),
    "state": (named(DROID, state=STATE[:, :5]), "5 numbers in state, expected 8"),
    "actions": (named(DROID, state=STATE) | {"actions": ACTIONS[:, :7]}, "7 numbers in actions, expected 8"),
}


@pytest.mark.parametrize(("arrays", "message"), UNFIT.values(), ids=UNFIT)
def test_what_does_not_fit_is_told_with_what_is_there(tmp_path, arrays, message):
    episode = RecordedEpisode.open(saved(tmp_path, arrays))
    with pytest.raises(DatasetError, match=message) as caught:
        EpisodeView(episode, droid())
    said = str(caught.value)
    assert "The file has actions float32" in said and "prompt <U7[]" in said
    assert "this droid policy needs the cameras observation/exterior_image_1_left, observation/wrist_image_left" in said


def test_one_file_for_two_cameras_is_not_guessed(tmp_path):
    arrays = {"images/front": PICTURES[0], "state": STATE, **COMMON}
    contract = generic(SLOTS, state_dim=8, action_dim=8, action_horizon=4)
    with pytest.raises(DatasetError, match="no pictures of camera top/front"):
        EpisodeView(RecordedEpisode.open(saved(tmp_path, arrays)), contract)


BAD = {
    "no state": (named(DROID), "state is missing, found actions"),
    "nothing": ({"x": np.zeros(3)}, "state, actions, images/<camera> is missing, found x float64"),
    "beyond float32": (
        named(DROID, state=STATE.astype(np.float64) + 1e300),
        r"state\[0\]\[0\] is 1e\+300, which is not",
    ),
    "NaN": (named(DROID, state=STATE) | {"actions": np.full((T, 8), np.nan)}, r"actions\[0\]\[0\] is nan"),
    "fewer steps": (named(DROID, state=STATE[:2]), r"state is float32 \[2, 8\], expected float32 \[T, n\] with T = 3"),
    "no colours": (named(DROID, state=STATE) | {f"images/{DROID[0]}": PICTURES[0][..., :1]}, "expected uint8"),
}


@pytest.mark.parametrize(("arrays", "message"), BAD.values(), ids=BAD)
def test_what_is_no_episode(tmp_path, arrays, message):
    with pytest.raises(DatasetError, match=message):
        RecordedEpisode.open(saved(tmp_path, arrays))


def test_other_arrays_are_not_read(tmp_path):
    """A camera's depth, a dict of notes: they are the recorder's."""
    path = saved(tmp_path, named(DROID, state=STATE) | {"notes": np.array([{"by": "me"}], dtype=object)})
    episode = RecordedEpisode.open(path)
    assert len(episode) == T and "notes object[1]" in episode.contents


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    for name, message in (
        ("pipe.npz", "not a regular file"),
        (".", "not a regular file"),
        ("none.npz", "no such file"),
    ):
        with pytest.raises(DatasetError, match=message):
            RecordedEpisode.open(tmp_path / name)
