"""What LeRobot 0.6.1 itself reads of v3, as a training of its own would: python samples.py v3 samples.npz, once.

Chunks of four actions for each frame with `action_is_pad`, and state, task and pictures beside them.
"""

import sys

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

chunk = [step / 10 for step in range(4)]
dataset = LeRobotDataset("ki-edge/small", root=sys.argv[1], delta_timestamps={"action": chunk}, video_backend="pyav")
samples = [dataset[index] for index in range(len(dataset))]
np.savez_compressed(
    sys.argv[2],
    action=np.stack([sample["action"].numpy() for sample in samples]),
    action_is_pad=np.stack([sample["action_is_pad"].numpy() for sample in samples]),
    state=np.stack([sample["observation.state"].numpy() for sample in samples]),
    front=np.stack([np.round(255 * sample["observation.images.front"].numpy()).astype(np.uint8) for sample in samples]),
    wrist=np.stack([np.round(255 * sample["observation.images.wrist"].numpy()).astype(np.uint8) for sample in samples]),
    task=np.array([sample["task"] for sample in samples]),
)
