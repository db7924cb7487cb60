"""Many small files by LeRobot itself, once, in a fresh folder each:

    python make_many.py av1 many_av1      LeRobot 0.6.1 (`lerobot[dataset]`, Python 3.12): v3.0
    python make_many.py h264 many_h264    the same
    python make_many.py v21 many_v21      LeRobot 0.3.3 with datasets 3.6: v2.1

Five episodes at 10 a second. What a frame holds is given by `frame` below: picture, state and action by episode and
step, and a task that changes within an episode. A v3.0 file ends after some kB, a folder after two files, so that there
are several of each, and videos with more than one episode.
"""

import sys

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

LENGTHS = (6, 4, 9, 1, 5)
AXES = ["height", "width", "channels"]
FEATURES = {
    "observation.joints": {"dtype": "float32", "shape": (3,), "names": ["a", "b", "c"]},
    "observation.gripper": {"dtype": "float32", "shape": (1,), "names": ["grip"]},
    "action": {"dtype": "float32", "shape": (4,), "names": ["a", "b", "c", "grip"]},
    "observation.images.top": {"dtype": "video", "shape": (48, 64, 3), "names": AXES},
    "observation.images.left_wrist": {"dtype": "video", "shape": (64, 64, 3), "names": AXES},
}


def picture(height, width, episode, t, base):
    """A bar that moves to the right on a ground whose colour tells the episode."""
    image = np.full((height, width, 3), (base, 40 * episode + 20, 60), np.uint8)
    image[:, 4 * t + 2 : 4 * t + 10] = 230
    return image


def frame(episode, t):
    """One step, and its task."""
    joints = np.array([0.1 * t, np.sin(episode + t), episode], np.float32)
    values = {
        "observation.joints": joints,
        "observation.gripper": np.array([t % 2], np.float32),
        "action": np.array([*(joints + np.float32(0.05)), (t + 1) % 2], np.float32),
        "observation.images.top": picture(48, 64, episode, t, 30),
        "observation.images.left_wrist": picture(64, 64, episode, t, 160),
    }
    return values, f"stack {episode % 2}" if t < 3 else "go home"


if __name__ == "__main__":
    kind, out = sys.argv[1:]
    given = {"fps": 10, "features": FEATURES, "root": out, "robot_type": "toy"}
    if kind == "v21":
        dataset = LeRobotDataset.create("ki-edge/many", **given)
        for episode, length in enumerate(LENGTHS):
            for t in range(length):
                values, task = frame(episode, t)
                dataset.add_frame(values, task)
            dataset.save_episode()
    else:
        from lerobot.configs.video import RGBEncoderConfig

        encoder = RGBEncoderConfig(vcodec={"av1": "libsvtav1", "h264": "h264"}[kind])
        sizes = {"video_files_size_in_mb": {"av1": 0.0027, "h264": 0.0041}[kind], "data_files_size_in_mb": 0.0035}
        dataset = LeRobotDataset.create("ki-edge/many", **given, rgb_encoder=encoder, **sizes)
        dataset.meta.update_chunk_settings(chunks_size=2)
        for episode, length in enumerate(LENGTHS):
            for t in range(length):
                values, task = frame(episode, t)
                dataset.add_frame({**values, "task": task})
            dataset.save_episode()
        dataset.finalize()
