"""Which feature becomes what: guessed where only one thing can be meant, told by a file, and never in silence."""

import json
from types import SimpleNamespace

import pytest

from ki_edge.errors import ArgumentError, DatasetError
from ki_edge.train.data.frames import Vector
from ki_edge.train.data.mapping import Slots, map_features, read_map

OPENPI = ["base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"]


def frames(*cameras, prefix="observation.images.", **vectors):
    vectors = vectors or {"observation.state": 3, "action": 2}
    return SimpleNamespace(
        cameras={f"{prefix}{name}": (4, 4) for name in cameras},
        vectors={name: Vector(size) for name, size in vectors.items()},
    )


def slots_of(found):
    return {slot: feature and feature.removeprefix("observation.images.") for slot, feature in found.cameras}


@pytest.mark.parametrize(
    ("cameras", "wanted"),
    [
        (["top"], ["top", None, None]),
        (["wrist", "front"], ["front", "wrist", None]),
        (["cam_high", "cam_left_wrist", "cam_right_wrist"], ["cam_high", "cam_left_wrist", "cam_right_wrist"]),
        (["cam_high", "cam_low", "cam_right_wrist"], ["cam_high", None, "cam_right_wrist"]),  # cam_low is never used
        (["left_wrist_0_rgb", "base_0_rgb"], ["base_0_rgb", "left_wrist_0_rgb", None]),
        (["base_0_rgb", "right_gripper"], ["base_0_rgb", None, "right_gripper"]),
        (["eye_in_hand", "agent"], ["agent", "eye_in_hand", None]),
    ],
)
def test_a_checkpoints_slots(cameras, wanted):
    found = map_features(frames(*cameras), "d", Slots(list(OPENPI), fixed=True), None)
    assert slots_of(found) == dict(zip(OPENPI, wanted, strict=True))
    keys = {camera.slot: camera.key for camera in found.contract_cameras()}
    assert keys == dict(zip(OPENPI, wanted, strict=True))
    assert [camera.required for camera in found.contract_cameras()] == [name is not None for name in wanted]
    line = found.lines("d")[0]
    assert line.startswith("d (guessed, --map FILE tells otherwise): cameras base_0_rgb = ")
    assert all(name in line for name in cameras)  # whatever became of it


@pytest.mark.parametrize(
    "cameras", [["front", "side"], ["top", "wrist", "hand"], ["top", "left_wrist", "left_hand"], ["a", "b", "c", "d"]]
)
def test_a_camera_that_could_be_more_than_one_is_not_guessed(cameras):
    with pytest.raises(
        DatasetError, match=r"^d: no camera slot takes observation\.images\.\w+; the model has base_0_rgb"
    ):
        map_features(frames(*cameras), "d", Slots(list(OPENPI), fixed=True), None)


def test_a_new_models_slots_are_the_datasets_own():
    slots = Slots()
    first = map_features(frames("wrist", "front"), "a", slots, None)
    assert slots_of(first) == {"front": "front", "wrist": "wrist"} and slots.names == ["front", "wrist"]
    second = map_features(frames("top", "hand"), "b", slots, None)  # the same kinds share a slot
    assert slots_of(second) == {"front": "top", "wrist": "hand"}
    third = map_features(frames("front", "side"), "c", slots, None)
    assert slots_of(third) == {"front": "front", "wrist": None, "side": "side"}
    assert slots_of(first.with_slots(slots.names)) == {"front": "front", "wrist": "wrist", "side": None}


def test_a_file_tells_otherwise():
    told = {
        "cameras": {"base_0_rgb": "side", "right_wrist_0_rgb": None, "observation.images.front": None},
        "state": ["observation.joints", "observation.grip"],
        "prompt": "fold",
        "delta": [True, False],
    }
    given = frames("front", "side", "wrist", **{"observation.joints": 3, "observation.grip": 1, "action": 2})
    found = map_features(given, "d", Slots(list(OPENPI), fixed=True), told)
    assert slots_of(found) == {"base_0_rgb": "side", "left_wrist_0_rgb": "wrist", "right_wrist_0_rgb": None}
    assert (found.state, found.action) == (("observation.joints", "observation.grip"), ("action",))
    assert (found.prompt, found.delta, found.unused) == ("fold", (True, False), ("observation.images.front",))
    assert "not used: observation.images.front" in found.lines("d")[0] and "prompt = 'fold'" in found.lines("d")[0]


@pytest.mark.parametrize(
    ("told", "line"),
    [
        ({"cameras": {"top": "front"}}, "--map names the camera slot top, the model has base_0_rgb"),
        ({"cameras": {"base_0_rgb": "rear"}}, "--map takes base_0_rgb from rear, which the dataset does not have"),
        ({"cameras": dict.fromkeys(["front", "wrist"])}, "no camera is left to see with"),
        (
            {"state": "joints"},
            r"--map takes state from joints, which .*; its features of numbers are action, observation",
        ),
        ({"delta": [True] * 3}, "delta has 3 entries, but the state has 3 numbers and the action 2"),
    ],
)
def test_a_file_that_does_not_fit_the_dataset(told, line):
    with pytest.raises(DatasetError, match=line):
        map_features(frames("front", "wrist"), "d", Slots(list(OPENPI), fixed=True), told)


def test_numbers_by_no_known_name():
    with pytest.raises(
        DatasetError, match=r'no feature is called observation\.state; .* as in \{"state": \["observation'
    ):
        map_features(frames("a", **{"observation.x": 3, "observation.y": 1, "action": 2}), "d", Slots(), None)
    found = map_features(frames("a", **{"observation.x": 3, "actions": 2}), "d", Slots(), None)  # only one can be meant
    assert (found.state, found.action) == (("observation.x",), ("actions",))


def test_two_features_of_one_short_name():
    given = frames("top")
    given.cameras["observation.top"] = (4, 4)
    found = map_features(given, "d", Slots(), None)
    assert len({camera.key for camera in found.contract_cameras()}) == 2


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"camera": {}}', "unknown entry 'camera', expected cameras, state"),
        ('{"cameras": ["a"]}', "cameras is .*, expected an object of slots"),
        ('{"state": []}', r"state is \[\], expected a feature or a list"),
        ('{"prompt": " "}', "prompt is ' ', expected a text"),
        ('{"delta": [1, 0]}', "delta is .*, expected a list of true and false"),
        ('{"datasets": {"c": {}}}', "c is no dataset of this run; they are a"),
        ('{"datasets": {}, "state": "x"}', "and nothing beside it"),
        ("[]", "expected a JSON object"),
        ("{", "map.json"),
    ],
)
def test_a_file_that_says_nothing_of_use(tmp_path, content, line):
    (tmp_path / "map.json").write_text(content)
    with pytest.raises(ArgumentError, match=line):
        read_map(tmp_path / "map.json", ["a"])


def test_a_file_for_several_datasets(tmp_path):
    path = tmp_path / "map.json"
    path.write_text('{"state": "x"}')
    assert read_map(path, ["a"]) == {"a": {"state": "x"}}
    with pytest.raises(ArgumentError, match=r'for several datasets expected ."datasets": ."a"'):
        read_map(path, ["a", "b"])
    path.write_text(json.dumps({"datasets": {"b": {"state": "x"}}}))
    assert read_map(path, ["a", "b"]) == {"b": {"state": "x"}}
