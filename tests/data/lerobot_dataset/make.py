"""Made with LeRobot 0.6.1 itself (`lerobot[dataset]`, Python 3.12), once: python make.py v3.

Two episodes in shared files: 7 and 5 frames at 10 a second. Frame t of episode e has grey level 20 t + 100 e in `front`
(video, AV1) and 20 t + 100 e + 5 in `wrist` (PNG in the column), state [t, e, 0.5] and action [10 t + e, -t].
"""

import sys

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

FEATURES = {
    "observation.state": {"dtype": "float32", "shape": (3,), "names": ["a", "b", "c"]},
    "action": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
    "observation.images.front": {"dtype": "video", "shape": (48, 64, 3), "names": ["height", "width", "channels"]},
    "observation.images.wrist": {"dtype": "image", "shape": (16, 24, 3), "names": ["height", "width", "channels"]},
}

dataset = LeRobotDataset.create("ki-edge/small", fps=10, features=FEATURES, root=sys.argv[1], robot_type="toy")
for episode, length in enumerate((7, 5)):
    for t in range(length):
        level = 20 * t + 100 * episode
        dataset.add_frame({
            "observation.state": np.array([t, episode, 0.5], np.float32),
            "action": np.array([10 * t + episode, -t], np.float32),
            "observation.images.front": np.full((48, 64, 3), level, np.uint8),
            "observation.images.wrist": np.full((16, 24, 3), level + 5, np.uint8),
            "task": f"task {episode}",
        })  # fmt: skip
    dataset.save_episode()
dataset.finalize()
