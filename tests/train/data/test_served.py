"""What a model is trained on is what it is served: a frame by the loader, and by the runtime from what is saved."""

import numpy as np
import pytest

from ki_edge.policy.contract import PolicyContract
from ki_edge.policy.normalize import read_norm_stats
from ki_edge.policy.prompt import PromptTokenizer
from ki_edge.policy.transforms import InputPipeline, OutputPipeline
from ki_edge.train.data.source import picture_of
from ki_edge.train.step.training_data import Share

pytest.importorskip("av", reason="pip install 'ki-edge[record]'")
JOINTS = ["observation.joints", "observation.gripper"]


@pytest.fixture
def mixture(data, small_dataset, opened):
    """Robots of three and of four numbers, other cameras, the first with actions relative to its state."""
    told = {"datasets": {
        "dataset": {"delta": [True, False, True]},
        "many_h264": {"state": JOINTS, "cameras": {"top": "observation.images.top", "hand": None}},
    }}  # fmt: skip
    return opened(f"{small_dataset}:1", f"{data / 'lerobot_dataset' / 'many_h264'}:1", told=told,
                  settings={"batch": 12, "steps": 2})  # fmt: skip


def test_frames_of_each_robot_come_to_the_model_as_in_training(mixture, tmp_path):
    mixture.save_assets(tmp_path)
    tokenizer = (tmp_path / "assets" / "tokenizer.model").read_bytes()
    seen = {0: 0, 1: 0}
    for batch in next(mixture.steps(0, Share())):
        for at in range(len(batch)):
            number, row = int(batch.source[at]), int(batch.row[at])
            source = mixture._assembler.actions[number]
            place = tmp_path if number == 0 else tmp_path / "robots" / mixture.names[1]
            contract = PolicyContract.load(place / "contract.json")
            stats = read_norm_stats((tmp_path / "assets" if number == 0 else place) / "norm_stats.json")
            words = PromptTokenizer(tokenizer, contract.prompt_format, contract.max_token_len)
            keys = [camera.key for camera in source.cameras if camera.key is not None]
            state = source.arrays["state"][row]
            inputs = InputPipeline(contract, stats, words)({
                "state": state, "prompt": source.task(row),
                "images": {key: picture_of(source, row, camera) for camera, key in enumerate(keys)},
            })  # fmt: skip
            observation = batch.observation
            np.testing.assert_array_equal(
                inputs.prompt_tokens, observation.prompt_tokens[at][observation.prompt_mask[at]]
            )
            np.testing.assert_array_equal(inputs.camera_mask, observation.camera_mask[at])
            np.testing.assert_array_equal(inputs.images, observation.images[at])
            sent = OutputPipeline(contract, stats)(batch.actions[at].numpy(), inputs.raw_state)
            recorded, real = source.chunk(row, contract.action_horizon)
            np.testing.assert_allclose(sent[real], recorded[real], atol=1e-5)  # absolute again, in robot units
            assert sent.shape[1] == (3, 4)[number]
            seen[number] += 1
    assert min(seen.values()) >= 4
