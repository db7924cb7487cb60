"""What LeRobot itself reads of a dataset of make_many.py: python samples_many.py many_av1 many_av1.npz, once.

With the version that wrote it. Chunks of four actions for each frame with `action_is_pad`, and timestamp, task and
pictures beside them. LeRobot 0.3.3 decodes with a class that newer torchvisions lack: there the frame of a time is the
nearest one of all that `av` decodes.
"""

import sys

import av
import numpy as np
import torch
import torchvision
from lerobot.datasets import lerobot_dataset
from lerobot.datasets.lerobot_dataset import LeRobotDataset


def decode(path, timestamps, tolerance, backend):
    with av.open(str(path)) as film:
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in film.decode(video=0)]
    found = [min(frames, key=lambda frame: abs(frame[0] - time)) for time in timestamps]
    assert all(abs(frame[0] - time) < tolerance for frame, time in zip(found, timestamps, strict=True))
    return torch.from_numpy(np.stack([frame[1] for frame in found]).transpose(0, 3, 1, 2)) / 255


if hasattr(lerobot_dataset, "decode_video_frames") and not hasattr(torchvision.io, "VideoReader"):
    lerobot_dataset.decode_video_frames = decode

chunk = [step / 10 for step in range(4)]
dataset = LeRobotDataset("ki-edge/many", root=sys.argv[1], delta_timestamps={"action": chunk}, video_backend="pyav")
samples = [dataset[index] for index in range(len(dataset))]


def column(name):
    return np.stack([sample[name].numpy() for sample in samples])


def pictures(name):
    return np.round(255 * column(f"observation.images.{name}")).astype(np.uint8)


np.savez_compressed(
    sys.argv[2],
    action=column("action"),
    action_is_pad=column("action_is_pad"),
    joints=column("observation.joints"),
    gripper=column("observation.gripper"),
    timestamp=column("timestamp"),
    episode=column("episode_index"),
    top=pictures("top"),
    left_wrist=pictures("left_wrist"),
    task=np.array([sample["task"] for sample in samples]),
)
