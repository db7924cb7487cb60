"""Which feature of a dataset is which part of a policy: guessed from names, or told by a file; always said.

The file is one JSON object, every entry optional:

    {"cameras": {"base_0_rgb": "observation.images.top", "observation.images.side": null},
     "state": ["observation.joints", "observation.gripper"], "action": "action",
     "prompt": "fold the shirt", "delta": [true, true, false]}

`cameras`: a camera slot and its feature; null: that slot stays empty, or that feature is not used. Several features of
`state` or `action` are put together in their order. `prompt`: instead of the recorded tasks. `delta`: actions that are
learnt relative to the state. For a mixture, {"datasets": {NAME: {...}}}.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ki_edge.errors import ArgumentError, DatasetError
from ki_edge.files.reading import read_object
from ki_edge.policy.contract import Camera
from ki_edge.policy.transforms import UNUSED_CAMERAS
from ki_edge.recordings.lerobot_layout import ACTION, STATE

from .frames import Frames, short
from .names import same

WRIST = re.compile(r"wrist|hand|gripper|eye_?in_?hand|ego_?arm", re.IGNORECASE)
SIDES = ("left", "right")
MAX_PROMPT = 4096  # characters
ENTRIES: Mapping[str, str] = {
    "cameras": "an object of slots to features or null",
    "state": "a feature or a list of features",
    "action": "a feature or a list of features",
    "prompt": "a text",
    "delta": "a list of true and false",
}


@dataclass(frozen=True)
class FeatureMap:
    """`cameras`: (slot, feature or None) in the model's order; `unused`: pictures that are left out on purpose."""

    cameras: tuple[tuple[str, str | None], ...]
    state: tuple[str, ...]
    action: tuple[str, ...]
    prompt: str | None = None
    delta: tuple[bool, ...] | None = None
    unused: tuple[str, ...] = ()
    guessed: bool = True

    def with_slots(self, slots: Sequence[str]) -> FeatureMap:
        """The same for a model that has more slots."""
        found = dict(self.cameras)
        return replace(self, cameras=tuple((slot, found.get(slot)) for slot in slots))

    @property
    def features(self) -> list[str]:
        """The features that are shown, in the order of their slots."""
        return [feature for _, feature in self.cameras if feature is not None]

    def contract_cameras(self) -> tuple[Camera, ...]:
        """The slots, and under which keys a robot shows its pictures: the features' short names."""
        names = [short(feature) for feature in self.features]

        def key(feature: str) -> str:
            return short(feature) if names.count(short(feature)) == 1 else feature

        return tuple(Camera(s, None, required=False) if f is None else Camera(s, key(f)) for s, f in self.cameras)

    def lines(self, name: str) -> list[str]:
        """What it says, for people."""
        how = "guessed, --map FILE tells otherwise" if self.guessed else "as --map says"
        cameras = ", ".join(f"{slot} = {feature or 'empty'}" for slot, feature in self.cameras)
        left = f"; not used: {', '.join(self.unused)}" if self.unused else ""
        prompt = "" if self.prompt is None else f"; prompt = {self.prompt!r}"
        delta = "" if self.delta is None else f"; relative to the state: {sum(self.delta)} of the actions"
        return [
            f"{name} ({how}): cameras {cameras}; state = {' + '.join(self.state)}; action = {' + '.join(self.action)}"
            f"{prompt}{delta}{left}"
        ]


@dataclass
class Slots:
    """The model's camera slots: those of a checkpoint are `fixed`; of a new model each dataset may add some."""

    names: list[str] = field(default_factory=list)
    fixed: bool = False


def read_map(path: Path, names: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """The entries of a map file for the datasets of these names. ArgumentError says what is wrong with it."""
    content = read_object(path, ArgumentError)
    if "datasets" not in content:
        if len(names) > 1:
            raise ArgumentError(
                f'{path}: for several datasets expected {{"datasets": {{"{names[0]}": {{...}}, ...}}}}, got '
                f"{', '.join(content)[:200]}"
            )
        content = {"datasets": {names[0]: content}} if names else {"datasets": {}}
    datasets = content["datasets"]
    if not isinstance(datasets, dict) or len(content) > 1:
        raise ArgumentError(f'{path}: expected {{"datasets": {{NAME: {{...}}}}}} and nothing beside it')
    datasets = {same(name): entries for name, entries in datasets.items()}
    for name, entries in datasets.items():
        where = f"{path}: {name}"
        if name not in names:
            raise ArgumentError(f"{where[:300]} is no dataset of this run; they are {', '.join(names)}")
        if not isinstance(entries, dict):
            raise ArgumentError(f"{where}: expected an object with {', '.join(ENTRIES)}")
        for entry, value in entries.items():
            if entry not in ENTRIES:
                raise ArgumentError(f"{where}: unknown entry {entry[:60]!r}, expected {', '.join(ENTRIES)}")
            if not _fits(entry, value):
                raise ArgumentError(f"{where}: {entry} is {value!r:.80}, expected {ENTRIES[entry]}")
    return datasets


def _fits(entry: str, value: Any) -> bool:
    if entry == "cameras":
        return isinstance(value, dict) and all(name and (f is None or isinstance(f, str)) for name, f in value.items())
    if entry == "prompt":
        return isinstance(value, str) and bool(value.strip()) and len(value) <= MAX_PROMPT
    if entry == "delta":
        return isinstance(value, list) and bool(value) and all(type(item) is bool for item in value)
    return _is_name(value) or (isinstance(value, list) and bool(value) and all(map(_is_name, value)))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def map_features(frames: Frames, name: str, slots: Slots, told: Mapping[str, Any] | None) -> FeatureMap:
    """The map of one dataset; a new model's slots may grow by it. DatasetError for a feature that is not there, and for
    pictures that no slot takes and that nobody said are not used.
    """
    told = told or {}
    cameras, unused = _cameras(frames, name, slots, told.get("cameras", {}))
    state = _vectors(frames, name, "state", told.get("state"), (STATE,))
    action = _vectors(frames, name, "action", told.get("action"), (ACTION, "actions"))
    delta = tuple(told["delta"]) if "delta" in told else None
    sizes = [sum(frames.vectors[one].size for one in features) for features in (state, action)]
    if delta is not None and len(delta) > min(sizes):
        raise DatasetError(
            f"{name}: delta has {len(delta)} entries, but the state has {sizes[0]} numbers and the action {sizes[1]}"
        )
    return FeatureMap(cameras, state, action, told.get("prompt"), delta, unused, not told)


def _vectors(frames: Frames, name: str, part: str, told: Any, usual: tuple[str, ...]) -> tuple[str, ...]:
    known = frames.vectors
    if told is not None:
        names = (told,) if isinstance(told, str) else tuple(told)
        if missing := [one for one in names if one not in known]:
            raise DatasetError(
                f"{name}: --map takes {part} from {missing[0]}, which the dataset does not have; its features of "
                f"numbers are {_list(known)}"
            )
        return names
    if found := next((one for one in usual if one in known), None):
        return (found,)
    prefix = "observation." if part == "state" else "action"
    close = [one for one in known if one.startswith(prefix)]
    if len(close) == 1:
        return (close[0],)
    raise DatasetError(
        f"{name}: no feature is called {usual[0]}; its features of numbers are {_list(known)}: say in --map FILE which "
        f'are the {part}, as in {{"{part}": {_example(close or list(known))}}}'
    )


def _example(names: list[str]) -> str:
    return "[" + ", ".join(f'"{name}"' for name in names[:3]) + "]"


def _list(names: Mapping[str, Any]) -> str:
    return ", ".join(sorted(names))[:400] or "none"


def _cameras(
    frames: Frames, name: str, slots: Slots, told: Mapping[str, str | None]
) -> tuple[tuple[tuple[str, str | None], ...], tuple[str, ...]]:
    full = {
        **{short(feature): feature for feature in frames.cameras},
        **{feature: feature for feature in frames.cameras},
    }
    found: dict[str, str] = {}
    empty, unused = set[str](), list[str]()
    for slot, feature in told.items():
        if feature is None and slot not in slots.names and slot in full:
            unused.append(full[slot])
        elif slots.fixed and slot not in slots.names:
            raise DatasetError(f"{name}: --map names the camera slot {slot}, the model has {', '.join(slots.names)}")
        elif feature is None:
            empty.add(slot)
        elif feature not in full:
            raise DatasetError(
                f"{name}: --map takes {slot} from {feature}, which the dataset does not have; its pictures are "
                f"{_list(frames.cameras)}"
            )
        else:
            found[slot] = full[feature]
    left = [one for one in _ordered(frames.cameras) if one not in found.values() and one not in unused]
    unused += [one for one in left if short(one) in UNUSED_CAMERAS]
    free = [slot for slot in slots.names if slot not in found and slot not in empty]
    left = [one for one in left if one not in unused]
    for feature, slot in [(one, slot) for one in left for slot in free if short(one) == short(slot)]:
        if feature in left and slot in free:
            found[slot] = feature
            left.remove(feature)
            free.remove(slot)
    for feature in list(left):
        left.remove(feature)
        place = _slot(short(feature), free, [short(one) for one in left])
        if place is None and not slots.fixed:
            place = _new(short(feature), {*slots.names, *found})
        if place is None:
            taken = ", ".join(f"{s} ({found[s]})" if s in found else s for s in slots.names)
            raise DatasetError(
                f"{name}: no camera slot takes {feature}; the model has {taken}: say in --map FILE which one does, as "
                f'{{"cameras": {{"{(free or slots.names)[0]}": "{feature}"}}}}, or "{feature}": null to leave it out'
            )
        found[place] = feature
        free = [one for one in free if one != place]
    new = [slot for slot in dict.fromkeys([*told, *found]) if slot in {*found, *empty} and slot not in slots.names]
    slots.names += sorted(new, key=is_wrist)
    if not found:
        raise DatasetError(f"{name}: no camera is left to see with; its pictures are {_list(frames.cameras)}")
    return tuple((slot, found.get(slot)) for slot in slots.names), tuple(unused)


def is_wrist(*names: str | None) -> bool:
    """Whether a camera by one of these names moves with a hand."""
    return any(name is not None and WRIST.search(name) for name in names)


def _ordered(cameras: Mapping[str, Any]) -> list[str]:
    """Those that stand still first, each kind by name."""
    return sorted(cameras, key=lambda feature: (is_wrist(short(feature)), feature))


def _slot(camera: str, free: Sequence[str], others: Sequence[str]) -> str | None:
    """The slot of a camera's kind, where no other one of its kind could be meant; of hands also by their side."""
    alike = [slot for slot in free if is_wrist(slot) == is_wrist(camera)]
    side = next((side for side in SIDES if side in camera.lower()), None)
    if is_wrist(camera) and side is not None and any(one in slot for slot in alike for one in SIDES):
        return next((slot for slot in alike if side in slot), None)
    rivals = [one for one in others if is_wrist(one) == is_wrist(camera)]
    return alike[0] if alike and not rivals else None


def _new(name: str, taken: set[str]) -> str:
    number = 2
    found = name
    while found in taken:
        found, number = f"{name}_{number}", number + 1
    return found
