"""Observations under LeRobot's keys and openpi's flat ones: the same model inputs as under the contract's own."""

import numpy as np
import pytest

from ki_edge.errors import ObservationError
from ki_edge.policy import contract as contracts
from ki_edge.policy.keys import expected, under_contract_keys
from ki_edge.policy.prompt import PromptTokenizer
from ki_edge.policy.transforms import InputPipeline

SIZES = {"image_size": (8, 8), "model_action_dim": 8, "normalization": "none", "action_horizon": 4}
GENERIC = contracts.generic(
    [contracts.Camera("base_0_rgb", "front"), contracts.Camera("left_wrist_0_rgb", "wrist", required=False)],
    state_dim=3, action_dim=2, **SIZES,
)  # fmt: skip
ONE = contracts.generic(["top"], state_dim=3, action_dim=2, **SIZES)
LIBERO = contracts.libero(action_horizon=4, normalization="none", image_size=(8, 8))
DROID = contracts.droid(action_horizon=4, normalization="none", image_size=(8, 8))
FRONT, WRIST = (np.full((6, 9, 3), shade, np.uint8) for shade in (40, 200))
STATE = np.array([0.1, -0.2, 0.3])
EIGHT = np.linspace(-0.5, 0.5, 8)
OWN = {"images": {"front": FRONT, "wrist": WRIST}, "state": STATE, "prompt": "fold"}


@pytest.fixture
def pipeline(tokenizer_model):
    def make(contract):
        tokenizer = PromptTokenizer(tokenizer_model, contract.prompt_format, contract.max_token_len)
        return InputPipeline(contract, {}, tokenizer)

    return make


def same(pipeline, contract, given, own):
    found, wanted = pipeline(contract)(given), pipeline(contract)(own)
    for field in ("images", "camera_mask", "prompt_tokens", "state", "raw_state"):
        np.testing.assert_array_equal(getattr(found, field), getattr(wanted, field), field)
    assert wanted.camera_mask.any()


LIBERO_OWN = {
    "observation/image": FRONT,
    "observation/wrist_image": WRIST,
    "observation/state": EIGHT,
    "prompt": "fold",
}
DROID_OWN = {
    "observation/exterior_image_1_left": FRONT,
    "observation/wrist_image_left": WRIST,
    "observation/joint_position": EIGHT[:7],
    "observation/gripper_position": EIGHT[7:],
    "prompt": "fold",
}


@pytest.mark.parametrize(
    "given",
    [
        {
            "observation.images.front": FRONT,
            "observation.images.wrist": WRIST,
            "observation.state": STATE,
            "task": "fold",
        },
        {"observation.images.front": FRONT, "images": {"wrist": WRIST}, "observation.state": STATE, "task": ["fold"]},
        {
            "observation.images.base_0_rgb": FRONT,
            "observation.images.left_wrist_0_rgb": WRIST,
            "state": STATE,
            "prompt": "fold",
            "index": 7,
        },
        {**OWN, "prompt": None, "task": "fold"},
    ],
)
def test_lerobots_keys(pipeline, given):
    same(pipeline, GENERIC, given, OWN)


def test_openpis_flat_keys(pipeline):
    contract = contracts.generic(["image", "wrist_image"], state_dim=3, action_dim=2, **SIZES)
    flat = {"observation/image": FRONT, "observation/wrist_image": WRIST, "observation/state": STATE, "prompt": "fold"}
    same(pipeline, contract, flat, {**OWN, "images": {"image": FRONT, "wrist_image": WRIST}})


def test_lerobots_keys_for_robots_with_flat_keys(pipeline):
    """LIBERO's data set in LeRobot has `image` and `wrist_image`, DROID's state is joints and gripper."""
    given = {"observation.images.image": FRONT, "observation.images.wrist_image": WRIST, "task": "fold"}
    same(pipeline, LIBERO, {**given, "observation.state": EIGHT}, LIBERO_OWN)
    given = {
        "observation.images.exterior_image_1_left": FRONT,
        "observation.images.wrist_image_left": WRIST,
        "task": "fold",
    }
    same(pipeline, DROID, {**given, "observation.state": EIGHT}, DROID_OWN)
    with pytest.raises(ObservationError, match=r"observation.state of the observation has shape \(7,\), .* \(8,\)"):
        pipeline(DROID)({**given, "observation.state": EIGHT[:7]})


def test_the_only_camera_needs_no_name(pipeline):
    given = {"observation.image": FRONT, "observation.state": STATE, "task": "fold"}
    same(pipeline, ONE, given, {**OWN, "images": {"top": FRONT}})


@pytest.mark.parametrize(("contract", "own"), [(GENERIC, OWN), (LIBERO, LIBERO_OWN), (DROID, DROID_OWN)])
def test_the_contracts_own_keys_stay_as_they_are(contract, own):
    assert under_contract_keys(contract, own) is own


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({**OWN, "observation.images.side": FRONT}, "unknown camera side; the contract has front, wrist"),
        ({**OWN, "observation.images.front": FRONT}, "gives front twice, the second time as observation.images.front"),
        ({**OWN, "task": "fold"}, "gives prompt twice, the second time as task"),
        ({**OWN, "observation.state": STATE}, "gives state twice"),
        ({"observation.images.a": FRONT, "observation.images.b": WRIST, "observation.state": STATE, "task": "x"},
         "unknown camera a, b"),
        ({"images": [1], "observation.state": STATE, "task": "x"}, '"images" must map'),
        ({"observation.images.front": FRONT, "task": "fold"}, "state is missing"),
        ({"observation.images.front": FRONT, "observation.state": STATE[:2], "task": "x"}, r"has shape \(2,\)"),
    ],
)  # fmt: skip
def test_what_is_ambiguous_is_refused(pipeline, given, message):
    with pytest.raises(ObservationError, match=message) as error:
        pipeline(GENERIC)(given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("contract", "wanted"),
    [
        (GENERIC, 'expected {"images": {"front": uint8 [h, w, 3], "wrist": uint8 [h, w, 3] (may be left out)}, '
                  '"state": float [3], "prompt": text}'),
        (LIBERO, 'expected {"observation/image": uint8 [h, w, 3], "observation/wrist_image": uint8 [h, w, 3], '
                 '"observation/state": float [8], "prompt": text}'),
        (DROID, 'expected {"observation/exterior_image_1_left": uint8 [h, w, 3], "observation/wrist_image_left": '
                'uint8 [h, w, 3], "observation/joint_position": float [7], "observation/gripper_position": float [1], '
                '"prompt": text}'),
    ],
)  # fmt: skip
def test_errors_print_what_is_expected(pipeline, contract, wanted):
    assert expected(contract) == wanted
    with pytest.raises(ObservationError) as error:
        pipeline(contract)({"prompt": "fold"})
    assert str(error.value).endswith(wanted)
