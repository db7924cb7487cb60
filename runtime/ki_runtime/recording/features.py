"""What each frame of a recorded run has: the columns of its dataset, with their types, shapes and names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ki_edge.recordings.lerobot_layout import ACTION, CAMERAS, DATA, FILES, STATE, VERSION, VIDEO

UNSAFE = re.compile(r"[^A-Za-z0-9_.-]+")
NONE = -1  # chunk, row or age where the robot held still: LeRobot's columns have no nulls
# LeRobot's own columns, of every dataset.
COUNTED = {"timestamp": "float32"} | dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64")


@dataclass(frozen=True, eq=False)
class Frame:
    """One command of a run. Vectors are f32, robot units.

    `age`: seconds since the observation from which the action was computed; `picture_age`: seconds since the pictures
    of this frame were made, 0 where they are of its own tick; `time`: seconds of the loop's clock since the episode
    began. `chunk`, `row`, `age` are None while the robot holds.
    """

    tick: int
    time: float
    state: npt.NDArray[np.float32]  # [s]
    action: npt.NDArray[np.float32]  # [a], as it was sent
    planned: npt.NDArray[np.float32]  # [a], before the guards; as it was sent while the robot holds
    pictures: Mapping[str, npt.NDArray[np.uint8]]  # camera -> RGB [h, w, 3]
    picture_age: float
    chunk: int | None
    row: int | None
    age: float | None
    seam: bool
    guards: tuple[str, ...]
    task: str


@dataclass(frozen=True)
class Features:
    """The columns of one dataset. `cameras`: name -> (height, width); `guards`: the kinds that there are.

    `stored`: pictures as films, which are small, or each as a PNG in the table of numbers, which loses nothing: films
    keep colour at half the size, in which a red ball of five pixels pales by a quarter.
    """

    fps: float
    robot: str
    state_dim: int
    action_names: tuple[str, ...]
    cameras: Mapping[str, tuple[int, int]]
    guards: tuple[str, ...]
    stored: Literal["video", "image"] = "video"

    @property
    def camera_keys(self) -> list[str]:
        """The features of the cameras."""
        return [CAMERAS + name for name in self.cameras]

    @property
    def video_keys(self) -> list[str]:
        """Those that are films."""
        return self.camera_keys if self.stored == "video" else []

    @property
    def image_keys(self) -> list[str]:
        """Those that are columns of the table of numbers."""
        return self.camera_keys if self.stored == "image" else []

    def columns(self) -> dict[str, tuple[str, tuple[int, ...], list[str] | None]]:
        """Column -> (type, shape, names) of all numbers that are stored in parquet files."""
        actions = list(self.action_names)
        return {
            STATE: ("float32", (self.state_dim,), [f"state_{i}" for i in range(self.state_dim)]),
            ACTION: ("float32", (len(actions),), actions),
            "ki.planned": ("float32", (len(actions),), actions),
            "ki.guards": ("bool", (len(self.guards),), list(self.guards)),
            "ki.chunk": ("int64", (1,), None),
            "ki.chunk_row": ("int64", (1,), None),
            "ki.observation_age": ("float32", (1,), None),
            "ki.picture_age": ("float32", (1,), None),
            "ki.seam": ("bool", (1,), None),
            "ki.tick": ("int64", (1,), None),
            "ki.time": ("float32", (1,), None),
            **{name: (dtype, (1,), None) for name, dtype in COUNTED.items()},
        }

    def values(self, frame: Frame) -> dict[str, Any]:
        """A frame's columns, without LeRobot's own."""
        return {
            STATE: frame.state,
            ACTION: frame.action,
            "ki.planned": frame.planned,
            "ki.guards": np.array([kind in frame.guards for kind in self.guards]),
            "ki.chunk": NONE if frame.chunk is None else frame.chunk,
            "ki.chunk_row": NONE if frame.row is None else frame.row,
            "ki.observation_age": float(NONE) if frame.age is None else frame.age,
            "ki.picture_age": frame.picture_age,
            "ki.seam": frame.seam,
            "ki.tick": frame.tick,
            "ki.time": frame.time,
        }

    def info(self, episodes: int, frames: int, tasks: int) -> dict[str, Any]:
        """The content of meta/info.json."""
        fps = int(self.fps) if float(self.fps).is_integer() else self.fps
        features: dict[str, Any] = {
            name: {"dtype": dtype, "shape": list(shape), "names": names}
            for name, (dtype, shape, names) in self.columns().items()
        }
        for key, (height, width) in zip(self.camera_keys, self.cameras.values(), strict=True):
            features[key] = {
                "dtype": self.stored,
                "shape": [height, width, 3],
                "names": ["height", "width", "channels"],
            }
            if self.stored == "image":
                continue
            facts: dict[str, Any] = {
                "video.height": height,
                "video.width": width,
                "video.channels": 3,
                "video.fps": fps,
            }
            facts |= {"video.codec": "h264", "video.pix_fmt": "yuv420p", "video.is_depth_map": False}
            features[key]["info"] = facts | {"has_audio": False, "is_depth_map": False}
        return {
            "codebase_version": VERSION,
            "robot_type": self.robot,
            "total_episodes": episodes,
            "total_frames": frames,
            "total_tasks": tasks,
            "chunks_size": FILES,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": fps,
            "splits": {"train": f"0:{episodes}"},
            "data_path": DATA,
            "video_path": VIDEO if self.video_keys else None,
            "features": features,
        }


def camera_names(keys: Iterable[str]) -> dict[str, str]:
    """A contract's camera keys -> their names in a dataset, which are folders too: no slashes, and no two alike."""
    found: dict[str, str] = {}
    for key in keys:
        plain = UNSAFE.sub("_", key.removeprefix("observation/").replace("/", ".")).strip(".") or "camera"
        name, count = plain, 1
        while name in found.values():
            count += 1
            name = f"{plain}_{count}"
        found[key] = name
    return found
