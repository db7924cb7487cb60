"""What openpi's clients and servers send, by formula; `tests/data/openpi_frames` has it as openpi-client packs it."""

import numpy as np


def picture(height: int, width: int, start: int) -> np.ndarray:
    """uint8 [h, w, 3]."""
    return ((np.arange(height * width * 3) * 7 + start) % 256).astype(np.uint8).reshape(height, width, 3)


def values() -> dict:
    """Name of a frame -> what is in it."""
    chunk = (np.arange(10 * 8) / 7 - 5).reshape(10, 8)
    return {
        "droid_observation": {
            "observation/exterior_image_1_left": picture(12, 16, 1),
            "observation/wrist_image_left": picture(12, 16, 2),
            "observation/joint_position": np.linspace(-1, 1, 7),
            "observation/gripper_position": np.array([0.25]),
            "prompt": "put the marker into the cup",
        },
        "libero_observation": {
            "observation/image": picture(8, 8, 3),
            "observation/wrist_image": np.ascontiguousarray(picture(8, 8, 4)[::-1, ::-1]),
            "observation/state": np.linspace(0, 1, 8, dtype=np.float32),
            "prompt": "öffne die Schublade 开抽屉",
        },
        "aloha_observation": {
            "state": np.ones(14),
            "images": {
                name: picture(6, 6, index).transpose(2, 0, 1)
                for index, name in enumerate(["cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist"])
            },
            "prompt": "uncap the pen",
        },
        "answer": {
            "state": chunk[0].astype(np.float32),
            "actions": chunk,
            "policy_timing": {"infer_ms": 61.5},
            "server_timing": {"infer_ms": 62.25, "prev_total_ms": 70.125},
        },
        "metadata": {"reset_pose": [0.0, -1.5, 1.5, 0.0, 0.0, 0.0], "name": "pi05"},
        "every_type": {
            **{kind: np.arange(6).reshape(2, 3).astype(kind) for kind in
               ("u1", "i1", "<u2", "<i2", "<i4", ">i4", "<u8", "<i8", "<f2", "<f4", ">f4", "<f8", "?")},
            "column order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
            "every second": np.arange(10.0)[::2],
            "none": np.zeros((0, 3), np.float32),
            "one": np.array(2.5),
            "texts": np.array(["ab", "cü"]),
            "bytes of texts": np.array([b"ab", b"c"]),
            "numbers": [np.float16(0.5), np.float32(1.5), np.float64(2.5), np.uint8(7), np.int64(-9), np.bool_(True)],
            "text": np.str_("a text"),
            "plain": [None, True, -1, 1 << 40, 1e300, "x", b"y", {"deep": [[]]}],
        },
    }  # fmt: skip
